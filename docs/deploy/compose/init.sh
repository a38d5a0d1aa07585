#!/bin/sh
# Makes what a deployment by docker-compose.yml needs and no repository holds.
#
#   init.sh files    keys, certificates, passwords, tokens and the filled-in
#                    configuration, below $OUT; what is there is kept
#   init.sh vault    initialises and unseals Vault, and lets the brokers in;
#                    root's token is revoked at its end
#   init.sh unseal   after Vault was restarted
#
# For a try-out and as a pattern: the authority's key, Vault's one unseal key and
# every password lie below $OUT, on one machine. In earnest each is made where it
# is used, and Vault unseals by a KMS or by several people.
set -eu
umask 077
OUT=${OUT:-/deploy}
IN=${IN:-/templates}

# own USER FILE...: the file is read by the container's user alone. Elsewhere
# than in the init container, which runs as root, the caller owns all.
own() {
	user=$1; shift
	if [ "$(id -u)" = 0 ]; then chown "$user" "$@"; fi
}
broker=65532:65532 postgres=999:999 redis=999:999 vault=100:1000 oidc=1000:0

# once FILE COMMAND...: FILE is what COMMAND prints, unless it is there.
once() {
	file=$OUT/$1; shift
	[ -s "$file" ] && return
	"$@" > "$file.new" && mv "$file.new" "$file"
}

# certificate NAME SAN...: NAME/tls.pem and NAME-tls-key, from our own authority.
certificate() {
	name=$1 where=$2 key=$3 san=$4
	[ -s "$OUT/$where" ] && return
	openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$OUT/$key" -subj "/CN=$name" -out "$OUT/$name.csr" 2>/dev/null
	printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=critical,digitalSignature\nbasicConstraints=critical,CA:FALSE\n' "$san" > "$OUT/$name.ext"
	openssl x509 -req -in "$OUT/$name.csr" -CA "$OUT/ca.pem" -CAkey "$OUT/ca.key" -days 90 -extfile "$OUT/$name.ext" -out "$OUT/$where" 2>/dev/null
	rm "$OUT/$name.csr" "$OUT/$name.ext"
	chmod 644 "$OUT/$where"
}

# server NAME: a certificate by which NAME is reached in its networks, by a
# browser on this machine, and over loopback.
server() { certificate "$1" "$1/tls.pem" "secrets/$1-tls-key" "DNS:$1,DNS:$1.localhost,DNS:localhost,IP:127.0.0.1"; }

# fill FILE TO: the template FILE with what stands between @ signs. What sed is
# told comes by stdin: arguments of a process can be read by everybody.
fill() {
	sed -f /dev/stdin "$IN/$1" > "$OUT/$2" <<END
s|@N@|${n:-}|g
s|@LOG_KEY@|$(cat "$OUT/public/log.pub")|g
s|@WITNESS_KEY@|$(cat "$OUT/public/witness.pub")|g
s|@REDIS_PASSWORD_SHA256@|$(printf %s "$(cat "$OUT/secrets/redis-password")" | openssl dgst -sha256 -r | cut -d' ' -f1)|g
s|@OIDC_SECRET@|$(cat "$OUT/secrets/oidc-secret")|g
s|@PEOPLE_PASSWORD@|$(cat "$OUT/people-password")|g
END
}

files() {
	for d in secrets public broker-1 broker-2 recorder witness vault redis postgres oidc; do mkdir -p "$OUT/$d"; done
	chmod 755 "$OUT" "$OUT"/*/
	if [ ! -s "$OUT/ca.pem" ]; then
		openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$OUT/ca.key" -out "$OUT/ca.pem" -days 365 \
			-subj "/CN=Countersign compose" -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
		chmod 644 "$OUT/ca.pem"
	fi
	for name in recorder witness vault redis postgres oidc; do server $name; done
	for n in 1 2; do
		certificate broker-$n broker-$n/tls.pem secrets/broker-$n-tls-key "DNS:broker-$n,DNS:broker.localhost,DNS:localhost,IP:127.0.0.1"
		certificate writer-$n broker-$n/writer.pem secrets/broker-$n-writer-key "URI:spiffe://countersign.local/broker/$n"
	done

	[ -s "$OUT/secrets/log-key" ] || countersign key generate log --name ledger.countersign.local/compose --out "$OUT/secrets/log-key" > "$OUT/public/log.pub"
	[ -s "$OUT/secrets/witness-key" ] || countersign key generate witness --name witness.countersign.local/compose --out "$OUT/secrets/witness-key" > "$OUT/public/witness.pub"
	[ -s "$OUT/secrets/privacy-key" ] || countersign key generate privacy --out "$OUT/secrets/privacy-key" > /dev/null
	[ -s "$OUT/secrets/identity-key" ] || countersign key generate identity --out "$OUT/secrets/identity-key" > /dev/null
	once secrets/ci-token countersign token create --file "$OUT/secrets/orchestrators" --role orchestrator --name ci
	once secrets/reviewer-token countersign token create --file "$OUT/secrets/recorder-tokens" --role reviewer --name reviewer
	for x in redis-password ledger-owner-password ledger-password postgres-password oidc-secret; do once secrets/$x openssl rand -hex 24; done
	once people-password openssl rand -hex 12
	once oidc-admin openssl rand -hex 24
	tls='sslmode=verify-full&sslrootcert=/etc/countersign/ca.pem'
	once secrets/ledger-owner-dsn printf 'postgres://countersign_owner:%s@postgres:5432/ledger?%s' "$(cat "$OUT/secrets/ledger-owner-password")" "$tls"
	once secrets/ledger-dsn printf 'postgres://countersign_recorder:%s@postgres:5432/ledger?%s' "$(cat "$OUT/secrets/ledger-password")" "$tls"
	once secrets/oidc-env printf 'KC_BOOTSTRAP_ADMIN_USERNAME=admin\nKC_BOOTSTRAP_ADMIN_PASSWORD=%s\n' "$(cat "$OUT/oidc-admin")"

	for n in 1 2; do fill serve.yaml broker-$n/serve.yaml; done
	fill record.yaml recorder/record.yaml
	fill witness.yaml witness/witness.yaml
	fill redis-users secrets/redis-users
	fill realm.json secrets/realm.json
	cp "$IN/vault.hcl" "$OUT/vault/"; cp "$IN/redis.conf" "$OUT/redis/"; cp "$IN/pg_hba.conf" "$IN/postgres-init.sh" "$OUT/postgres/"
	for d in broker-1 broker-2 recorder; do cp "$IN/catalogue.yaml" "$OUT/$d/"; done
	for d in broker-1 broker-2 recorder witness vault redis postgres oidc public; do cp "$OUT/ca.pem" "$OUT/$d/"; chmod 644 "$OUT/$d"/*; done
	chmod 755 "$OUT/postgres/postgres-init.sh"

	s=$OUT/secrets
	own $broker "$s"/broker-* "$s"/recorder-* "$s"/witness-* "$s"/log-key "$s"/privacy-key "$s"/identity-key "$s"/orchestrators "$s"/*-token "$s"/ledger-dsn "$s"/ledger-owner-dsn "$s"/oidc-secret "$s"/redis-password
	own $redis "$s"/redis-users "$s"/redis-tls-key
	own $postgres "$s"/postgres-* "$s"/ledger-password "$s"/ledger-owner-password
	own $vault "$s"/vault-tls-key
	own $oidc "$s"/oidc-tls-key "$s"/realm.json "$s"/oidc-env
	echo "init: files are below $OUT; people are ada, ben and rosa, with the password in people-password until they choose their own"
}

unseal() { sed -n 's/^Unseal Key 1: //p' "$OUT/vault-init.txt" | tr -d '\n' | vault write sys/unseal key=- > /dev/null; }

vault_() {
	if [ ! -s "$OUT/vault-init.txt" ]; then
		vault operator init -key-shares=1 -key-threshold=1 > "$OUT/vault-init.new"
		mv "$OUT/vault-init.new" "$OUT/vault-init.txt"
	fi
	unseal
	if [ -s "$OUT/vault-done" ]; then echo "init: Vault is set up"; return; fi
	VAULT_TOKEN=$(sed -n 's/^Initial Root Token: //p' "$OUT/vault-init.txt")
	export VAULT_TOKEN
	# With raft the node leads a moment after it is unsealed.
	until vault token lookup > /dev/null 2>&1; do sleep 0.2; done
	vault secrets list | grep -q '^secret/' || vault secrets enable -path=secret -version=2 kv > /dev/null
	vault kv put secret/demo greeting=hello > /dev/null
	vault auth list | grep -q '^approle/' || vault auth enable approle > /dev/null
	countersign scopes vault "$IN/catalogue.yaml" | sh > /dev/null
	for n in 1 2; do
		vault write auth/approle/role/countersign-broker-$n token_policies=countersign-broker token_no_default_policy=true token_period=1h > /dev/null
		vault write auth/approle/role/countersign-broker-$n/role-id role_id=countersign-broker-$n > /dev/null
		vault write -f -field=secret_id auth/approle/role/countersign-broker-$n/secret-id > "$OUT/secrets/broker-$n-vault.new"
		mv "$OUT/secrets/broker-$n-vault.new" "$OUT/secrets/broker-$n-vault"
		own $broker "$OUT/secrets/broker-$n-vault"
	done
	vault token revoke -self > /dev/null
	date > "$OUT/vault-done"
	echo "init: Vault takes both brokers by AppRole; root's token is revoked"
}

case ${1:-} in
files) files ;;
vault) vault_ ;;
unseal) unseal ;;
*) echo "init.sh files | vault | unseal" >&2; exit 2 ;;
esac
