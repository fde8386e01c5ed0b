"""The base model: finding, checking, quantizing and loading it, and putting LoRA adapters on it."""
