# Fills MODELS with the repository in the folder SEED, or in the archive at ARCHIVE_URL whose SHA-256 is
# ARCHIVE_SHA256. Ends with an error, and the pod does not start, if a sum does not match.
set -eu
if [ -n "${ARCHIVE_URL:-}" ]; then
  archive=$MODELS/.seed.tar.gz
  wget -q -O "$archive" "$ARCHIVE_URL"
  echo "$ARCHIVE_SHA256  $archive" | sha256sum -c -
  tar -xzf "$archive" -C "$MODELS"
  rm "$archive"
else
  # Names with a leading dot (lock, unfinished work) are the other server's own.
  cp -R "$SEED"/[!.]* "$MODELS"
fi
cd "$MODELS"
if [ -f SHA256SUMS ]; then
  sha256sum -c SHA256SUMS
  rm SHA256SUMS
fi
