#!/bin/sh
# Makes the ledger's database and the two roles over it: one that owns the
# tables, and the recorder's, which cannot change an entry. The image's
# entrypoint runs it once, on an empty volume.
set -eu
psql --no-psqlrc -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\set owner `cat /run/secrets/ledger-owner-password`
\set recorder `cat /run/secrets/ledger-password`
CREATE ROLE countersign_owner LOGIN PASSWORD :'owner';
CREATE ROLE countersign_recorder LOGIN PASSWORD :'recorder';
CREATE DATABASE ledger OWNER countersign_owner ENCODING 'UTF8' TEMPLATE template0;
SQL
