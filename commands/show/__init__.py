"""What the command line prints: tables and JSON on stdout, progress on stderr."""
