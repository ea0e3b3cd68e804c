"""What maps take of memory and disk, and how long it takes until a disk answers again."""
