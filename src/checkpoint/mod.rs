//! Files: Hugging Face models, PEFT adapters, training checkpoints.
