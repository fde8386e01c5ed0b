"""What is shipped: an adapter merged into its base, as a Hugging Face folder or a GGUF file, or as a GGUF LoRA file."""
