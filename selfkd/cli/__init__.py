"""What the commands share: flags, progress, tables."""
