# The host's part in a guest with cloud-init, run early in each of its boots, before its network and
# sshd. `seed` puts an interpreter and the variables root_password_hash, machine_id, forget_access,
# greeting, files (those of its template: a gzipped tar archive in base64) and agent (in a guest that
# is to be saved, the program that waits there, in base64) before it.
#
# Owns: what a first boot needs that a cloud-config of the user's would take away if it were in ours,
# where a list replaces a list; and telling the host over the channel how cloud-init has ended, which
# the agent does in its own way.
# INSTANCE_ID is cloud-init's: where it is new, the boot is the first.

export LC_ALL=C
umask 022
channel_name=org.oscloud.channel.0
result=/run/cloud-init/result.json
marker=/var/lib/oscloud/$INSTANCE_ID
runtime_dir=/run/oscloud

# The host takes no longer line.
most_bytes=3000

allow_root() {
    [ ! -d /etc/ssh/sshd_config.d ] || echo "PermitRootLogin yes" >/etc/ssh/sshd_config.d/10-oscloud.conf
    [ -z "$root_password_hash" ] || echo "root:$root_password_hash" | chpasswd -e
}

# Where a distribution has no update-motd, its pam_motd reads a directory.
install_greeting() {
    if [ -d /etc/update-motd.d ]; then
        printf '#!/bin/sh\necho "%s"\n' "$greeting" >/etc/update-motd.d/99-os-cloud-welcome
        chmod 0755 /etc/update-motd.d/99-os-cloud-welcome
    else
        mkdir -p /etc/motd.d
        echo "$greeting" >/etc/motd.d/99-os-cloud-welcome
    fi
}

# On a disk that has been another guest's; who may log in now, cloud-init writes down after this.
forget_access() {
    [ -n "$forget_access" ] || return 0
    echo "root:*" | chpasswd -e || return 1
    cut -d : -f 6 /etc/passwd | while read -r home; do rm -f "$home/.ssh/authorized_keys"; done
}

# Of a disk that has been another guest's; systemd reads it at the next boot.
renew_machine_id() {
    [ -z "$machine_id" ] || echo "$machine_id" >/etc/machine-id
}

install_files() {
    [ -z "$files" ] || printf '%s' "$files" | base64 -d | tar -x -z -p -f - -C /
}

first_boot() {
    forget_access && allow_root && renew_machine_id && install_greeting && install_files || exit 1
    mkdir -p "${marker%/*}"
    : >"$marker"
}

# Each write waits until the host listens, and the read until it does no more, so that a daemon which
# takes another's place is told, too.
report() {
    # cloud-init waits until nobody has what it reads the output from; a redirection of the function
    # would keep that open beside.
    exec </dev/null >/dev/null 2>&1
    until port=$(grep -l -x "$channel_name" /sys/class/virtio-ports/*/name); do
        sleep 1
    done
    port=${port%/name}
    exec 3<>"/dev/${port##*/}"
    until [ -s "$result" ]; do
        echo "oscloud-cloud-init: running" >&3 || exit
        sleep 1
    done
    while echo "oscloud-cloud-init: ended: $(tr -d '\r\n' <"$result" | head -c "$most_bytes")" >&3; do
        read -r _ <&3
    done
}

# A unit of its own: what it does is no part of this boot, which it sees through to its end.
start_agent() {
    mkdir -p -m 0700 "$runtime_dir"
    printf '%s' "$agent" | base64 -d >"$runtime_dir/agent.py"
    systemd-run --quiet --no-block --collect --unit=oscloud-agent \
        python3 -I "$runtime_dir/agent.py" "$INSTANCE_ID" ||
        echo "oscloud-identity: failed: no program can be started by systemd-run" >/dev/ttyS0
}

# A clone's first boot of its own has configured its network, which later ones do not again.
rm -f /etc/cloud/cloud.cfg.d/99-oscloud-clone.cfg

if [ -n "$agent" ]; then
    start_agent
else
    report &
fi
[ -e "$marker" ] || first_boot
