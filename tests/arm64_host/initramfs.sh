#!/bin/busybox sh
# The first process: mounts the first disk, unpacks the second one (a tar archive) into it, and
# continues with the script "inside.sh" from there.
PATH=/bin
/bin/busybox mkdir -p /proc /new
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module.ko" || echo "arm64 host: no module $module"
done </modules/order
mount -t ext4 /dev/vda /new || exec poweroff -f
tar -C /new/root -xf /dev/vdb || exec poweroff -f
mount --move /dev /new/dev
exec switch_root /new /bin/sh /root/dmaproof/tests/arm64_host/first_process.sh
