#!/bin/sh
# Installs programs that are not on PATH from Debian's packages of the same names, and starts none of them:
# `deploy/programs.sh redis-server prometheus`. Exit 1 if one is still missing.
set -u
missing=
for program in "$@"; do command -v "$program" >/dev/null || missing="$missing $program"; done
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "programs: installing$missing" >&2
    apt-get update -qq >/dev/null 2>&1
    for program in $missing; do
        RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            -o DPkg::Lock::Timeout=120 "$program" >/dev/null 2>&1
    done
fi
failed=0
for program in $missing; do
    command -v "$program" >/dev/null && continue
    echo "programs: $program is missing (Debian: apt-get install $program)" >&2
    failed=1
done
exit $failed
