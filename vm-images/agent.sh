#!/bin/sh
# The agent in a test guest: runs commands that arrive on the second serial port.
#
#   guest → host   READY <boot id>                          once, when it starts
#   host → guest   <id> <limit in seconds> <base64 command>
#   guest → host   <id> <exit code> <base64 of output>      stdout and stderr together
#
# One line a message, both ways; base64 keeps binary output and quotes out of the framing. Output is
# cut at 1 MiB. Ends with 2 if the machine has no second serial port. The same file serves in busybox and in Debian (dash and coreutils).
port=/dev/ttyS1
dir=/run/vhostd-agent
mkdir -p "$dir"
stty -F "$port" 115200 raw -echo || exit 2 # no such port: nobody to serve
exec 3<>"$port"
printf 'READY %s\n' "$(cat /proc/sys/kernel/random/boot_id)" >&3
while read -r id limit_s command <&3; do
    printf '%s' "$command" | base64 -d >"$dir/command"
    timeout "$limit_s" sh "$dir/command" </dev/null >"$dir/output" 2>&1 3>&-
    code=$?
    printf '%s %s %s\n' "$id" "$code" "$(head -c 1048576 "$dir/output" | base64 | tr -d '\n')" >&3
done
