#!/usr/bin/env bash
# A real Slurm of one node on this machine, for tests/experiments/test_slurm.py: starts munge and the daemons in a folder of their
# own, runs a command with them, and ends them. It needs root, and apt where Slurm isn't installed.
#   tests/slurm_node.sh make test-slurm
# Exit status: that of the command; 77 where there can be no Slurm, with a sentence that says why.
set -euo pipefail

skip() { echo "Slurm is left out: $*" >&2; exit 77; }

[ "$(id -u)" = 0 ] || skip "its daemons need root."
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    command -v apt-get >/dev/null || skip "there is neither Slurm nor apt."
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1 \
        || skip "apt could not install slurm-wlm and munge."
fi

place=$(mktemp -d /tmp/slurm-XXXXXX)
chmod 755 "$place"
mkdir "$place/state" "$place/spool" "$place/munge"
pids=()
end() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$place"
}
trap end EXIT

# A key and a socket of its own: another munge of this machine is left alone.
dd if=/dev/urandom of="$place/munge/key" bs=1024 count=1 status=none
chmod 400 "$place/munge/key"
chown -R munge: "$place/munge"
chmod 755 "$place/munge"
setpriv --reuid munge --regid munge --clear-groups munged --foreground --key-file "$place/munge/key" \
    --socket "$place/munge/socket" --pid-file "$place/munge/pid" --log-file "$place/munge/log" \
    --seed-file "$place/munge/seed" >"$place/munged.out" 2>&1 &
pids+=($!)

# CPUs are granted twice over, so that two jobs run beside each other on a machine of one core.
cat >"$place/slurm.conf" <<CONF
ClusterName=vlprompt
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$place/munge/socket
CredType=cred/munge
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=1
KillWait=5
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:2
CONF
export SLURM_CONF="$place/slurm.conf"
export VLPROMPT_TEST_SLURM=test  # the partition

for _ in $(seq 100); do [ -S "$place/munge/socket" ] && break; sleep 0.1; done
slurmctld -D >"$place/slurmctld.out" 2>&1 &
pids+=($!)
slurmd -D >"$place/slurmd.out" 2>&1 &
pids+=($!)

for _ in $(seq 120); do
    if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
        "$@" && status=0 || status=$?
        exit "$status"
    fi
    sleep 0.5
done
cat "$place"/munged.out "$place"/slurmctld.out "$place"/slurmd.out "$place"/*.log >&2 2>/dev/null || true
skip "its daemons did not come up; what they said stands above."
