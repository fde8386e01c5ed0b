"""qlora_dist trains QLoRA adapters on shards of domain corpora, merges them exactly, and proves what it did."""

__version__ = "0.1.0"
