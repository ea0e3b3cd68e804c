"""vhostd: a vhost-user-blk back-end over a log-structured volume store."""

__all__ = ["__version__"]

__version__ = "0.1.0"
