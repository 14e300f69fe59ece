#!/bin/bash
# What the image is for, tried inside it as its own user; some minutes on two cores, ends with "the image works".
#   docker run --rm --shm-size=4g IMAGE bash -c "$(cat cluster/smoke.sh)"
set -euo pipefail

echo "user $(id -un) ($(id -u)) in $PWD"
test "$(id -u)" -ne 0
python -c 'import deepspeed, ray, raymodels; print("raymodels", raymodels.__version__, "ray", ray.__version__)'
cd "$(mktemp -d)"
raymodels doctor

# `ray up` starts everything in a login shell, copies by rsync and reaches the workers by ssh.
bash -lc 'command -v ray raymodels'
command -v rsync ssh

# KubeRay's probes: of every pod by HTTP, of a RayService's workers by bash and wget; the token is not asked for.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef
ray start --head --num-cpus=0 --disable-usage-stats > ray.log 2>&1 || { cat ray.log; exit 1; }
probe='wget --tries 1 -T 2 -q -O- http://localhost:52365/api/healthz | grep success &&
       wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success &&
       wget --tries 1 -T 10 -q -O- http://localhost:8265/api/gcs_healthz | grep success'
for _ in {1..30}; do bash -c "$probe" && break || sleep 1; done
bash -c "$probe"
ray stop > /dev/null
unset RAY_AUTH_MODE RAY_AUTH_TOKEN

# Prepare, train, publish, serve and call.
python /app/jobs/demo.py
echo "the image works"
