# What this catalogue needs in Vault. Paste it into a shell whose VAULT_ADDR and
# VAULT_TOKEN are those of an operator who may write policies and token roles.
# The secret engines' mounts and roles are yours to set up.

vault policy write countersign-aws-deploy - <<'EOF'
# What a step granted aws:deploy may do.

path "aws/creds/test/+" {
  capabilities = ["read"]
}

path "aws/creds/live/+" {
  capabilities = ["read"]
}
EOF

vault policy write countersign-aws-session - <<'EOF'
# What a step granted aws:session may do.

path "aws/sts/+" {
  capabilities = ["create", "update"]
}
EOF

vault policy write countersign-secret-many - <<'EOF'
# What a step granted secret:many may do.

path "secret/data/team/+/config" {
  capabilities = ["read", "list"]
}

path "secret/metadata/team/*" {
  capabilities = ["list"]
}

path "secret/data/team/private/config" {
  capabilities = ["deny"]
}
EOF

vault policy write countersign-cert - <<'EOF'
# What a step granted cert may do.

path "team/pki/issue/server" {
  capabilities = ["create", "update"]
}

path "team/pki/sign/server" {
  capabilities = ["create", "update"]
}

path "team/pki/issue/client" {
  capabilities = ["create", "update"]
}

path "team/pki/sign/client" {
  capabilities = ["create", "update"]
}
EOF

vault policy write countersign-broker - <<'EOF'
# What Countersign's broker may do.

# Make a child token for one step, under the role of its scope.
path "auth/token/create/countersign-aws-deploy" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-aws-session" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-secret-many" {
  capabilities = ["update"]
}

path "auth/token/create/countersign-cert" {
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
    "lease_id" = ["aws/creds/live/*", "aws/creds/test/*"]
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

vault write auth/token/roles/countersign-aws-deploy \
    allowed_policies=countersign-aws-deploy \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=3660s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-aws-session \
    allowed_policies=countersign-aws-session \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=3660s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-secret-many \
    allowed_policies=countersign-secret-many \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=86460s \
    token_no_default_policy=true \
    token_type=service

vault write auth/token/roles/countersign-cert \
    allowed_policies=countersign-cert \
    orphan=true \
    renewable=true \
    token_explicit_max_ttl=86460s \
    token_no_default_policy=true \
    token_type=service

# Give the broker's login this policy and no other, for an AppRole:
#   vault write auth/approle/role/countersign token_policies=countersign-broker token_no_default_policy=true
