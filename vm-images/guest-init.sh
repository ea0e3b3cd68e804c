#!/bin/busybox sh
# /init of the test guest: everything lives in the initramfs, so that any disk can be wiped or lost.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev 2>/dev/null
/bin/busybox --install -s 2>/dev/null
mkdir -p /run /tmp /mnt
mount -t tmpfs -o mode=1777 tmpfs /tmp
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/ TERM=linux
while read -r module; do
    insmod "$module" || echo "init: $module did not load"
done </lib/modules.list
echo "init: the agent listens on ttyS1"
while :; do
    sh /agent.sh
    echo "init: the agent ended with code $?; starting it again"
    sleep 1
done
