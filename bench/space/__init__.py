"""What a pool takes on the disk while a volume is overwritten and its snapshots rotate."""
