package main

// doctorCheck is one kind of finding, as docs/doctor.md lists it.
type doctorCheck struct {
	code  string
	of    string // the processes whose files it is about
	title string // what it finds
	mend  string // what to do about it
}

// checks are all that doctor looks for. docs/doctor.md is made from them by
// `go generate`.
var checks = []doctorCheck{
	{"secret-file", "serve, record, witness", "a file of a key, token or password is missing, empty or cannot be read", "make the file, or let the user that the process runs as read it; docs/operations.md says how each is made"},
	{"secret-open", "serve, record, witness", "a file of a key, token or password may be read by others", "chmod 600 the file, and have the user own it that the process runs as"},
	{"disk", "serve, record, witness", "a disk that is written to is full, or nearly", "make room, or give the directory a disk of its own: a ledger that cannot be written issues nothing"},
	{"clock", "serve, record", "the clock of recorder, Vault or PostgreSQL is off this machine's", "have NTP set the clocks of all machines: a receipt counts for 30 s, and hours, expiries and retention go by the clock"},
	{"certificate", "serve, record, witness", "certificate and key cannot be read, or do not go together", "put the certificate's own private key in the key file, both as PEM, the certificate first and its issuers after it"},
	{"certificate-ends", "serve, record, witness", "a certificate has ended, or ends within 30 days", "renew it"},
	{"certificate-name", "serve, record", "the certificate is not for the name by which the listener is reached", "have a certificate issued for that name, or put the name that the certificate has into the configuration"},
	{"listen-address", "serve, record, witness", "a listener's address cannot be had", "listen on an address of this machine, and on a port that the user may open"},
	{"listen-plain", "serve, record, witness", "a listener is reached from elsewhere without TLS", "set cert and key; or see to it that what ends TLS in front is the only one that reaches the listener"},

	{"public-url", "serve", "public_url is not https", "give the broker an https address: relying parties fetch keys there, and take them for true"},
	{"discovery", "serve", "the discovery document of step identity cannot be had at public_url, or is another's", "start the broker, and let public_url lead to its listener from where relying parties are; brokers that share a public_url share its identity_key"},
	{"identity-key", "serve", "the keys of step identity cannot be read", "countersign key generate identity --out FILE, once, and carry the file to each broker"},
	{"catalogue", "serve, record", "catalogue or policy do not compile", "countersign scopes lint CATALOGUE says where"},
	{"nobody-can-ask", "serve", "a scope that no orchestrator may ask for, or no orchestrator at all", "name the orchestrator in the scope's ask, and make it a token (countersign token create --role orchestrator) or a rule under orchestrators.oidc"},
	{"orchestrators", "serve", "an OpenID provider of orchestrators does not answer, or answers for another issuer", "put the provider's exact issuer there, and let the broker reach it"},
	{"log-key", "serve", "recorder.log_key is not the key of the recorder's log", "put there what `countersign key show log.key` prints at the recorder"},
	{"recorder", "serve", "the recorder does not answer", "start it, let this machine reach it, and name in recorder.ca who issued its certificate"},
	{"recorder-login", "serve", "the recorder does not take this broker's token or certificate", "countersign token create --file TOKENS --role writer --name NAME at the recorder, and carry the token here; or name the certificate under certificates there"},
	{"head-file", "serve, record", "the file of the last head cannot be written", "make its directory, for the user that the process runs as"},

	{"vault", "serve", "Vault does not answer", "start it, let this machine reach it, and name in vault.ca who issued its certificate"},
	{"vault-sealed", "serve", "Vault is sealed, or was never initialised", "vault operator unseal"},
	{"vault-login", "serve", "Vault does not take the broker's login", "give the broker a token, or role ID and secret ID, that are in force"},
	{"vault-renew", "serve", "the broker's token cannot be renewed, or ends whatever is done", "use AppRole, or a periodic orphan token: vault token create -orphan -period=24h -no-default-policy -policy=countersign-broker"},
	{"vault-broad", "serve", "the broker's login may do more than it needs", "give it the policy that `countersign scopes vault CATALOGUE` prints and no other"},
	{"vault-capability", "serve", "the broker's login lacks what a scope needs", "run what `countersign scopes vault CATALOGUE` prints as Vault's operator"},
	{"vault-role", "serve", "a scope's token role is missing or not as the catalogue needs it", "run what `countersign scopes vault CATALOGUE` prints as Vault's operator"},
	{"vault-policy", "serve", "a scope's policy is missing, or is not what the catalogue asks for", "run what `countersign scopes vault CATALOGUE` prints as Vault's operator"},
	{"vault-ttl", "serve", "Vault's own ceiling is below a scope's max_ttl", "vault auth tune, vault secrets tune or the server's max_lease_ttl: raise it, or lower the scope's max_ttl"},
	{"database-role", "serve", "a scope's role of the database engine is missing", "make the role, or name the one there is under vault.role of the scope"},
	{"database-ttl", "serve", "a database role's default_ttl or max_ttl is below its scope's max_ttl", "raise it to the scope's max_ttl: database/creds takes no TTL, the step's token is what ends the credential"},
	{"database-sessions", "serve", "a database role's revocation statements do not end open sessions", "add to revocation_statements: SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{{name}}'"},
	{"vault-audit", "serve", "Vault has no audit device", "vault audit enable file file_path=/var/log/vault/audit.log, and have the recorder follow it (docs/vault-audit.md)"},

	{"redis", "serve", "Redis does not answer", "start it, let this machine reach it, and check user and password"},
	{"redis-command", "serve", "the Redis user may not use a command, or not on these keys", "let the user use it on the broker's keys (ACL SETUSER); docs/operations.md has the rules"},
	{"redis-eviction", "serve", "Redis drops keys when its memory is full", "set maxmemory-policy noeviction"},
	{"redis-memory", "serve", "Redis has no ceiling to its memory, or is near it", "set maxmemory to what the machine can spare, and no less than what a busy day needs"},
	{"redis-plain", "serve", "Redis is reached over a network without TLS or without a password", "use rediss:// and a user of its own with a password"},

	{"gateway-missing", "serve", "a scope is delivered by a gateway that this broker does not run", "set gateway.http, gateway.postgres or gateway.mcp; without it the scope is refused (delivery-unsupported)"},
	{"upstream", "serve", "a target of the access path cannot be reached", "let this machine reach it, or say under gateway.upstreams where it is"},
	{"proxy-ca", "serve", "the forward proxy's authority cannot be used, or ends within 30 days", "take forward-proxy.pem away for a new one, and have steps trust that"},

	{"dir", "record, witness", "the directory cannot be written", "make it, for the user that the process runs as"},
	{"head-beside", "record", "the head file is on the disk of the ledger's database", "set head_file to a place on another disk: who puts an old disk back puts back both, and nothing would be noticed"},
	{"keys-beside", "record", "the keys of erasable texts lie where the database's backup would take them along", "set keys_file to a directory of its own that no backup covers: a backup that holds both undoes erasures"},
	{"writers", "record", "nobody may write", "countersign token create --file TOKENS --role writer --name broker-1, or certificates"},
	{"recorder-key", "record", "the log's key or the privacy key is not one", "countersign key generate log, countersign key generate privacy"},
	{"approval-off", "record", "nobody can be asked for an approval", "set approval; without it every scope that needs people is refused"},
	{"groups-claim", "record", "the OpenID provider does not say who is in which group, so that nobody can approve", "have the provider put the groups into ID tokens, and name the claim as groups_claim"},
	{"people-login", "record", "the OpenID provider of people does not answer, or answers for another issuer", "put the provider's exact issuer into approval.oidc.issuer, and let the recorder reach it"},
	{"people-redirect", "record", "the OpenID provider does not take the recorder's client or redirect URI", "register base_url + /login/callback as redirect URI of client_id"},
	{"slack-token", "record", "Slack does not take the bot's token, or it is another workspace's", "put the token of the app's bot (xoxb-...) in token_file, and that workspace's ID in team"},
	{"slack-secret", "record", "the signing secret is not one of Slack's", "copy the signing secret (32 hexadecimal digits) from the app's basic information, not the client secret"},
	{"unwitnessed", "record", "nobody but the recorder could tell that the log was rewritten", "set witnesses, or keep (docs/operations.md, Witnesses)"},
	{"witness-away", "record", "a witness does not answer", "start it, and let the recorder reach it"},
	{"vault-audit-log", "record", "Vault's audit log cannot be followed", "let the recorder read the file, and its token update sys/audit-hash/DEVICE (docs/vault-audit.md)"},
	{"metrics-open", "serve, record", "metrics are served to whoever reaches the address", "listen on 127.0.0.1, or let the network bring nobody but Prometheus there"},

	{"postgres", "record", "PostgreSQL does not answer", "start it, let this machine reach it, and check the connection string in postgres_file"},
	{"postgres-durable", "record", "PostgreSQL would lose acknowledged entries in a crash", "turn fsync, full_page_writes and synchronous_commit on"},
	{"postgres-role", "record", "the recorder's role may alter the log: it is a superuser, owns the tables, or may UPDATE, DELETE or TRUNCATE", "countersign ledger init --postgres OWNER-DSN --role NAME, and put that role in postgres_file"},
	{"postgres-encoding", "record", "the database's encoding is not UTF8", "createdb --encoding UTF8 --template template0"},
	{"ledger", "record", "the ledger's schema is missing, altered, or not of this version", "countersign ledger init makes it; docs/upgrade.md says how one of another version is handled; an altered one is evidence: keep it"},

	{"witness-log", "witness", "a log's key is not one", "put there what `countersign key show log.key` prints at the recorder"},

	{"catalogue-differs", "several files", "two processes have different catalogues or policies", "carry the same files to both: what differs is refused, never granted"},
	{"key-differs", "several files", "two processes do not have the same privacy key, identity key or log key", "carry the same file to both"},
	{"writer-twice", "several files", "two brokers have one name at the recorder, or one head file", "give each broker a writer, a token and a head_file of its own"},
	{"writer-unknown", "several files", "a broker's token or name is not known to the recorder", "countersign token create --file TOKENS --role writer --name NAME at the recorder, and carry the token to the broker"},
	{"redis-alone", "several files", "several brokers do not share a Redis", "set redis for all brokers to the same server: an embedded one serves a single broker"},
	{"nobody-can-approve", "several files", "a scope needs people, and the recorder asks nobody", "set approval at the recorder"},
}
