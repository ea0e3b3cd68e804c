"""Moving whole disks: between volumes and image files, through the path that guests use."""
