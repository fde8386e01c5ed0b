"""Evaluation answers three questions with error bars: is it better on the domain, is it in form, what did it forget."""
