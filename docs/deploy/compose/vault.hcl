disable_mlock = true # as Vault's manual has it for raft: swap is to be off or encrypted
api_addr      = "https://vault:8200"
cluster_addr  = "https://vault:8201"

storage "raft" {
  path    = "/vault/file"
  node_id = "vault"
}

listener "tcp" {
  address         = "0.0.0.0:8200"
  cluster_address = "0.0.0.0:8201"
  tls_cert_file   = "/etc/vault/tls.pem"
  tls_key_file    = "/run/secrets/vault-tls-key"
}
