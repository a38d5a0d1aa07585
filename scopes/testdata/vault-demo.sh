# What this catalogue needs in Vault. Paste it into a shell whose VAULT_ADDR and
# VAULT_TOKEN are those of an operator who may write policies and token roles.
# The secret engines' mounts and roles are yours to set up.

vault policy write countersign-vault-demo-read - <<'EOF'
# What a step granted vault:demo-read may do.

path "secret/data/demo" {
  capabilities = ["read"]
}
EOF

vault policy write countersign-vault-demo-write - <<'EOF'
# What a step granted vault:demo-write may do.

path "secret/data/demo" {
  capabilities = ["create", "update"]
}
EOF

vault policy write countersign-vault-demo-admin - <<'EOF'
# What a step granted vault:demo-admin may do.

path "secret/*" {
  capabilities = ["create", "read", "update", "patch", "delete", "list"]
}
EOF

vault policy write countersign-pki-service - <<'EOF'
# What a step granted pki:service may do.

path "pki/issue/service" {
  capabilities = ["create", "update"]
}

path "pki/sign/service" {
  capabilities = ["create", "update"]
}
EOF

vault policy write countersign-ssh-deploy - <<'EOF'
# What a step granted ssh:deploy may do.

path "ssh/sign/deploy" {
  capabilities = ["create", "update"]
}
EOF

vault policy write countersign-http-demo - <<'EOF'
# What a step granted http:demo may do.

path "secret/data/http-demo" {
  capabilities = ["read"]
}
EOF

vault policy write countersign-mcp-demo - <<'EOF'
# What a step granted mcp:demo may do.

path "secret/data/mcp-demo" {
  capabilities = ["read"]
}
EOF

vault policy write countersign-mcp-demo-refund - <<'EOF'
# What a step granted mcp:demo-refund may do.

path "secret/data/mcp-demo" {
  capabilities = ["read"]
}
EOF

vault policy write countersign-orders-db-read - <<'EOF'
# What a step granted orders-db:read may do.

path "database/creds/orders-read" {
  capabilities = ["read"]
}
EOF

vault policy write countersign-orders-db-write - <<'EOF'
# What a step granted orders-db:write may do.

path "database/creds/orders-write" {
  capabilities = ["read"]
}
EOF

vault policy write countersign-broker - <<'EOF'
# What Countersign's broker may do.

# Make a child token for one step, under the role of its scope.
path "auth/token/create/countersign-vault-demo-read" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-vault-demo-write" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-vault-demo-admin" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-pki-service" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-ssh-deploy" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-http-demo" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-mcp-demo" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-mcp-demo-refund" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-orders-db-read" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-orders-db-write" {
  capabilities = ["update"]
}

# Extend a child once it is on record, and end it, by its accessor.
path "auth/token/renew-accessor" {
  capabilities = ["update"]
}

path "auth/token/revoke-accessor" {
  capabilities = ["update"]
}

# End the leases of children at once, and no other lease.
path "sys/leases/revoke" {
  capabilities = ["update"]
  allowed_parameters = {
    "lease_id" = ["database/creds/orders-read/*", "database/creds/orders-write/*"]
    "sync" = []
  }
}

# Keep the broker's own login alive, and see what it may do.
path "auth/token/renew-self" {
  capabilities = ["update"]
}

path "auth/token/lookup-self" {
  capabilities = ["read"]
}

path "sys/capabilities-self" {
  capabilities = ["update"]
}
EOF

vault write auth/token/roles/countersign-vault-demo-read \
    allowed_policies=countersign-vault-demo-read \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-vault-demo-write \
    allowed_policies=countersign-vault-demo-write \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-vault-demo-admin \
    allowed_policies=countersign-vault-demo-admin \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-pki-service \
    allowed_policies=countersign-pki-service \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=3660s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-ssh-deploy \
    allowed_policies=countersign-ssh-deploy \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=1860s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-http-demo \
    allowed_policies=countersign-http-demo \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-mcp-demo \
    allowed_policies=countersign-mcp-demo \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-mcp-demo-refund \
    allowed_policies=countersign-mcp-demo-refund \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-orders-db-read \
    allowed_policies=countersign-orders-db-read \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-orders-db-write \
    allowed_policies=countersign-orders-db-write \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=960s \
    token_no_default_policy=true \
    token_type=service

# Give the broker's login this policy and no other, for an AppRole:
#   vault write auth/approle/role/countersign token_policies=countersign-broker token_no_default_policy=true
