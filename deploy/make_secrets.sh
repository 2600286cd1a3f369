#!/bin/sh
# Makes the passwords of the index and of the bucket, and the index's user, in folder $1, unless they are there.
set -eu
cd "$1"
umask 022
password() { od -An -tx1 -N32 /dev/urandom | tr -d ' \n'; }
[ -s bucket_password ] || password > bucket_password
if [ -s users.acl ]; then exit 0; fi
password > redis_password
# One user, on this program's keys and channel only, and without what administers the server.
printf 'user default off\nuser kvstore on >%s ~kvstore:v1:* &kvstore:v1:* +@all -@admin -@dangerous +info\n' "$(cat redis_password)" \
    > users.acl
