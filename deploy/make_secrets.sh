#!/bin/sh
# Makes the index's password and its user in folder $1, unless they are there.
set -eu
cd "$1"
if [ -s users.acl ]; then exit 0; fi
umask 022
password=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
printf '%s\n' "$password" > redis_password
# One user, on this program's keys and channel only, and without what administers the server.
printf 'user default off\nuser kvstore on >%s ~kvstore:v1:* &kvstore:v1:* +@all -@admin -@dangerous +info\n' "$password" > users.acl
