#!/usr/bin/env bash
# Makes a certificate authority, the server's certificate, and a key for each node.
#
#     ./certificates.sh FOLDER SERVER_NAME_OR_ADDRESS NODE...
#
# The server gets FOLDER/ca.crt, server.pem, server.key and keys/*.pub. A node gets ca.crt and its own NODE.key. ca.key
# signs certificates: keep it off all of these machines.
set -euo pipefail
if (( $# < 3 )); then sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
folder=$1 server=$2; shift 2
mkdir -p "$folder/keys"
cd "$folder"
umask 077
case $server in
  *[!0-9.]*) names="DNS:$server" ;;
  *) names="IP:$server" ;;
esac
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 825 -subj "/CN=lwfedssl federation" \
  -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$server" \
  -keyout server.key -out server.csr 2>/dev/null
printf 'subjectAltName=%s,DNS:localhost,IP:127.0.0.1\n' "$names" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -extfile server.ext \
  -out server.pem 2>/dev/null
rm -f server.csr server.ext ca.srl
for node in "$@"; do  # Flower takes NIST curves, not ed25519
  ssh-keygen -q -t ecdsa -b 384 -N '' -C "$node" -f "$node.key"
  mv "$node.key.pub" "keys/$node.pub"
done
