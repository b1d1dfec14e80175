"""What we use of other libraries without their promise: private names and version differences, one file a library."""
