"""What is checked before any work, told in one message."""
