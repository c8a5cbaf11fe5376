"""Files that are whole or absent, here or in remote storage."""
