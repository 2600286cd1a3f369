#!/bin/sh
# `kvstore` in containers on one loopback: each serves at the first address that no other holds, by a lock that ends with it.
run() { exec /opt/kvstore/bin/python -m kvstore_server.cli "$@"; }
if [ "$1" != serve ]; then
    if [ -f /tmp/target ]; then export KVSTORE_TARGET="$(cat /tmp/target)"; fi
    run "$@"
fi
for address in 127.0.0.21 127.0.0.22; do
    exec 9>"/var/cache/kvstore/$address"
    if flock --nonblock 9; then
        echo "$address:7700" > /tmp/target
        export KVSTORE__LISTEN__ADDRESS="$address:7700" KVSTORE__LISTEN__METRICS_ADDRESS="$address:7701"
        run "$@"
    fi
done
echo "every address is taken" >&2
exit 1
