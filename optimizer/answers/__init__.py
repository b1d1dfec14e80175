"""What answers a prompt: a model opened in any runtime, its prompts, its text as it comes."""
