#!/bin/sh
# Installs Debian packages whose programs are not on PATH, without starting them: `deploy/programs.sh redis-server prometheus`.
# Exit 1 if one is still missing.
set -u
missing=
for program in "$@"; do command -v "$program" >/dev/null || missing="$missing $program"; done
if [ -z "$missing" ]; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "programs: installing$missing" >&2
    # shellcheck disable=SC2086  # several words on purpose
    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 $missing; } >/dev/null 2>&1
fi
for program in $missing; do
    command -v "$program" >/dev/null || { echo "programs: $program is missing (Debian: apt-get install $program)" >&2; failed=1; }
done
exit "${failed:-0}"
