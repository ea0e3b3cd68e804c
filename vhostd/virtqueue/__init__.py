"""The guest's side of a disk: split rings, a driver, a vhost-user front-end, a block device.

`block` is the client library that the command line uses; the rest is what it stands on, and what
the tests of the device side are written with. `reference` is the device side in plain Python, to
be read and to be compared with.
"""
