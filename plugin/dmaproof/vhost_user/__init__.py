"""A vhost-user back end: the messages, a session for each front end, and the process that serves.

Written from the vhost-user specification (QEMU documentation, interop).
"""
