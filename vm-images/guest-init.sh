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
# A shell on the console, for people.
while :; do
    setsid cttyhack sh -l </dev/ttyS0 >/dev/ttyS0 2>&1
    sleep 1
done &
while :; do
    sh /agent.sh
    code=$?
    [ "$code" -ne 2 ] || break
    echo "init: the agent ended with code $code; starting it again"
    sleep 1
done
# Process 1 must not end.
wait
