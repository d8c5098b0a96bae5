#!/bin/sh
# Play everybody's part in examples/deploy once, for docker/compose.yaml: a coordinator and three hospitals, each in a
# volume of its own. In a real federation four people type these lines, at four places, and compare fingerprints by
# telephone where it says --yes.
set -eu
umask 077
example=$(dirname "$0")
cd /srv
if [ -e operator/operator.json ]; then
    echo "the federation is there already"
    exit 0
fi
if [ -n "$(ls coordinator)" ]; then
    echo "an earlier setup broke off: docker compose -f docker/compose.yaml down --volumes, then again" >&2
    exit 1
fi

sed 's/^address = .*/address = "server:9443"/' "$example/federation.toml" > /tmp/federation.toml
fedchorus provision /tmp/federation.toml --out coordinator
python "$example/make_data.py" /tmp/data
for site in north south west; do
    fedchorus enrol coordinator/invitation.json --name "$site" --out "$site"
    cp "$example/policy.toml" "$site/policy.toml"
    cp "/tmp/data/$site.csv" "$site-data/tumours.csv"
    sed -i 's/^# listen = .*/listen = "127.0.0.1:9100"/' "$site/site.toml"
    printf '\n[data.tumours]\npath = "/srv/data/tumours.csv"\n' >> "$site/site.toml"
done
fedchorus sign coordinator north/request.json south/request.json west/request.json --yes
for site in north south west; do
    fedchorus accept "$site" "coordinator/kits/$site.kit.json" --yes
done
# Last: by this file the next start sees that all is done.
cp coordinator/operator/operator.json operator/operator.json
