"""A protocol test suite for any vhost-user-blk back-end.

pytest tests/protocol                               vhostd, qemu-storage-daemon, the reference
pytest tests/protocol --backends=vhostd             one of them
pytest tests/protocol --backend-socket=/run/x.sock  whatever listens there (its disk is
                                                    overwritten)
"""
