"""A vhost-user back end: the messages, a session for each front end, and the device process.

Written after the vhost-user specification (QEMU documentation, interop).
"""
