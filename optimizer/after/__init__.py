"""What a conversion says once it is done."""
