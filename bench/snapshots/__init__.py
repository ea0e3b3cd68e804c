"""What snapshots cost: taking one, reading and writing with many, the first write after one."""
