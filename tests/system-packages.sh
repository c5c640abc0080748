#!/bin/sh
# Debian packages that the tests look at results with: installs those that are missing. Where that can't be done,
# says so and goes on: the tests that need them are skipped, each with its reason.
missing=""
for package in "$@"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null; then
  echo "system packages: no apt-get here to install$missing; tests that need them are skipped"
  exit 0
fi
if [ "$(id -u)" = 0 ]; then
  as_root=""
elif sudo -n true 2>/dev/null; then
  as_root="sudo -n"
else
  echo "system packages: neither root nor sudo to install$missing; tests that need them are skipped"
  exit 0
fi
echo "system packages: installing$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086 # several words each
if ! { $as_root apt-get update && $as_root apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends $missing; } >"$log" 2>&1; then
  tail -n 5 "$log"
  echo "system packages:$missing can't be installed; tests that need them are skipped"
fi
