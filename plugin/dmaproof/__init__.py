"""The devices' side of the proof: dirty bitmaps, dirty trackers, devices and QEMU's dirty log.

Nothing in this package knows a QEMU process or QMP; that is `qmp_tools`.
"""
