"""Side-by-side benchmarks of vhost-user-blk back-ends; see README.md here."""
