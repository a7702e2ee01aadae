#!/bin/sh
# Fetch $CHECKPOINT_URL to $1, unless its SHA-256 is not $CHECKPOINT_SHA256.
set -eu
partial="$1.partial"
curl --fail --silent --show-error --location --proto '=http,https' --retry 5 --max-time 600 --max-filesize 2000000000 \
  --output "$partial" "$CHECKPOINT_URL"
if ! echo "$CHECKPOINT_SHA256  $partial" | sha256sum -c - >/dev/null; then
  echo "$CHECKPOINT_URL: SHA-256 is $(sha256sum "$partial" | cut -d ' ' -f 1), not CHECKPOINT_SHA256=$CHECKPOINT_SHA256:" \
    "check both in the ConfigMap palisade-model" >&2
  rm -f "$partial"
  exit 1
fi
mv "$partial" "$1"
