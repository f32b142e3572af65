#!/bin/bash
# A SLURM of one machine: munge, controller and node, all state in the folder given. Needs root, slurm-wlm and munge.
#
#   tests/slurm/setup.sh FOLDER start|stop
#
# Afterwards: export SLURM_CONF=FOLDER/slurm.conf
# A requeued job waits for cred_expire seconds (SLURM's default: 120) before it starts again. Letting it go at once by
# scontrol update StartTime=now must not be done: where it starts in the second in which it was requeued, slurmd takes its
# credential for the old, revoked one, and the job ends as FAILED. Jobs of "urgent" preempt those of "main".
set -eu
folder=$1
conf=$folder/slurm.conf
if [ "$2" = stop ]; then
    for daemon in slurmd slurmctld munged; do
        [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" || true
    done
    exit 0
fi
mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
host=$(hostname -s)
cat > "$conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
ReturnToService=2
KillWait=60
MinJobAge=600
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10
CONF
dd if=/dev/urandom of="$folder/munge/key" bs=1 count=1024 2> /dev/null
chmod 400 "$folder/munge/key"
chmod 755 "$folder" "$folder/munge"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge/seed"
export SLURM_CONF=$conf
slurmctld -f "$conf"
slurmd -f "$conf"
for _ in $(seq 60); do
    sinfo -h -o %T 2> /dev/null | grep -q idle && exit 0
    sleep 0.5
done
sinfo -R || true
echo "the node did not come up; see $folder/*.log" >&2
exit 1
