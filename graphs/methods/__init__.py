"""One file a method; the file name is the registry."""
