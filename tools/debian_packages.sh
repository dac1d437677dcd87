#!/bin/sh
# Installs what Debian's packages bring, where it is missing: tools/debian_packages.sh COMMAND=PACKAGE …
set -eu
PATH="$PATH:/usr/sbin:/sbin"

missing=
for pair in "$@"; do
  command -v "${pair%%=*}" >/dev/null 2>&1 || missing="$missing ${pair#*=}"
done
# The page's pictures have Chinese in them.
fc-list :lang=zh 2>/dev/null | grep -q . || missing="$missing fontconfig fonts-noto-cjk"
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
  sudo=sudo
  command -v sudo >/dev/null 2>&1 || { echo "error: install these as root, and run the same again:$missing" >&2; exit 1; }
fi
command -v apt-get >/dev/null 2>&1 || { echo "error: there is no apt-get; install the likes of$missing" >&2; exit 1; }
echo "installing$missing"
$sudo apt-get update -qq
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
