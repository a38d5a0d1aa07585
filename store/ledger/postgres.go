package ledger

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"go.uber.org/zap"
)

// postgres is the engine for a ledger that outgrows one machine. One session
// writes, and holds an advisory lock while it lasts: whoever loses the session
// loses the lock and the means to write with it, and no session is ever opened
// again in its place (ErrLost).
type postgres struct {
	dsn    string
	config *pgx.ConnConfig
	schema string
	log    *zap.Logger

	migrations []migration
}

// schemaName is what may be quoted nowhere: it stands in the bodies of functions.
var schemaName = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,40}$`)

const (
	// beatEvery is how often the session that writes is tried, and so how long a
	// recorder that was cut off may go on answering reads.
	beatEvery = time.Second
	// writeWithin is how long one commit may take before the session is given up.
	writeWithin = 30 * time.Second
	// connectWithin is how long it may take to log in.
	connectWithin = 10 * time.Second
)

// unparsed is why a connection string is none, without the string, which pgx
// repeats: it leaves out what it takes for a password, and no other form of one.
// Where it could not read the string, its reason quotes it too.
func unparsed(err error) string {
	text := err.Error()
	i := strings.LastIndex(text, "`: ")
	if i < 0 {
		return "cannot be read"
	}
	if text = text[i+len("`: "):]; strings.HasPrefix(text, "failed to parse") {
		text, _, _ = strings.Cut(text, " (")
	}
	return text
}

func newPostgres(dsn string, log *zap.Logger) (*postgres, error) {
	c, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("the ledger's connection string: %s", unparsed(err))
	}
	p := &postgres{dsn: dsn, config: c, schema: cmp.Or(c.RuntimeParams["search_path"], "countersign"), log: log, migrations: migrations}
	if !schemaName.MatchString(p.schema) {
		return nil, fmt.Errorf("search_path %q of the ledger's connection string: want one schema, in small letters, digits and _", p.schema)
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectWithin
	}
	for k, v := range map[string]string{
		// pg_temp last: else a temporary table would stand before the ledger's own.
		"search_path": p.schema + ", pg_temp",
		// Every statement here has an index to go by, whatever the planner knows of
		// the tables so far.
		"enable_seqscan": "off", "jit": "off",
		"statement_timeout": "0",
		// A recorder whose machine is gone loses its session, and with it the lock,
		// within half a minute.
		"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3", "tcp_user_timeout": "30000",
	} {
		c.RuntimeParams[k] = v
	}
	for k, v := range map[string]string{"synchronous_commit": "on", "application_name": "countersign"} {
		if c.RuntimeParams[k] == "" {
			c.RuntimeParams[k] = v
		}
	}
	return p, nil
}

// connect opens a pool of sessions. The files of certificates that the connection
// string names are read anew for each of them, so that renewed ones count; ones
// that cannot be read leave those before in force.
func (p *postgres) connect(c *pgx.ConnConfig) *sql.DB {
	return stdlib.OpenDB(*c, stdlib.OptionBeforeConnect(func(_ context.Context, to *pgx.ConnConfig) error {
		now, err := pgx.ParseConfig(p.dsn)
		if err != nil {
			p.log.Error("the certificates of the ledger's connection string are not read again, the old stay in force", zap.String("error", unparsed(err)))
			return nil
		}
		to.TLSConfig, to.Fallbacks = now.TLSConfig, now.Fallbacks
		return nil
	}))
}

func (p *postgres) open() (w, r *sql.DB, err error) {
	w = p.connect(p.config)
	w.SetMaxOpenConns(1)
	return w, p.openReader(8), nil
}

// openReader returns a pool of sessions that can only read.
func (p *postgres) openReader(conns int) *sql.DB {
	c := p.config.Copy()
	c.RuntimeParams["default_transaction_read_only"] = "on"
	c.RuntimeParams["default_transaction_isolation"] = "repeatable read" // as SQLite reads
	r := p.connect(c)
	r.SetMaxOpenConns(conns)
	r.SetMaxIdleConns(conns)
	return r
}

// claim takes the lock, and refuses a server that would acknowledge a commit
// which a crash takes back.
func (p *postgres) claim(ctx context.Context, c *sql.Conn) error {
	var fsync, pages, commit, encoding string
	if err := c.QueryRowContext(ctx, "SELECT current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit'), current_setting('server_encoding')").Scan(&fsync, &pages, &commit, &encoding); err != nil {
		return err
	}
	switch {
	case fsync != "on" || pages != "on":
		return fmt.Errorf("the PostgreSQL server runs with fsync %s and full_page_writes %s: a ledger there would lose entries; turn both on", fsync, pages)
	case commit != "on" && commit != "remote_apply":
		return fmt.Errorf("the ledger's connection string sets synchronous_commit to %s: a ledger needs on or remote_apply", commit)
	case encoding != "UTF8":
		return fmt.Errorf("the PostgreSQL database has the encoding %s: a ledger needs UTF8", encoding)
	}
	var ok bool
	if err := c.QueryRowContext(ctx, "SELECT pg_try_advisory_lock($1::int, hashtext($2))", applicationID, p.schema).Scan(&ok); err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: the lock of schema %s is held", ErrLocked, p.schema)
	}
	return nil
}

func (*postgres) release(ctx context.Context, c *sql.Conn) error {
	_, err := c.ExecContext(ctx, "SELECT pg_advisory_unlock_all()")
	return err
}

func (*postgres) begin() string { return "BEGIN" }

// insert is one statement, whose arguments are the columns as arrays.
func (*postgres) insert(ctx context.Context, w *writer, into string, width int, args []any, suffix string) error {
	if len(args) == 0 {
		return nil
	}
	arrays, types := make([]any, width), make([]string, width)
	for i := range width {
		switch args[i].(type) {
		case int64:
			arrays[i], types[i] = every[int64](args, i, width), "bigint"
		case string:
			arrays[i], types[i] = every[string](args, i, width), "text"
		case []byte:
			arrays[i], types[i] = every[[]byte](args, i, width), "bytea"
		}
		types[i] = fmt.Sprintf("$%d::%s[]", i+1, types[i])
	}
	return w.exec(ctx, "INSERT INTO "+into+" SELECT * FROM unnest("+strings.Join(types, ", ")+")"+suffix, arrays...)
}

// every is each width'th of args, from i on.
func every[T any](args []any, i, width int) []T {
	out := make([]T, 0, len(args)/width)
	for ; i < len(args); i += width {
		out = append(out, args[i].(T))
	}
	return out
}

func (*postgres) list(elem string) string {
	return "(SELECT value::" + elem + ", key FROM jsonb_array_elements_text($1::jsonb) WITH ORDINALITY AS x(value, key)) j"
}

func (*postgres) by(string) string { return "" }

// walk compares rows, and sorts by both: with column = $1 the planner might as
// well walk the primary key and read every entry there is. Only the index on
// (column, idx) has this order.
func (*postgres) walk(column, and, order string) string {
	return fmt.Sprintf("FROM entries a WHERE a.%[1]s IS NOT NULL AND (a.%[1]s, a.idx) >= ($1::text, $2::bigint) AND (a.%[1]s, a.idx) < ($1::text, $3::bigint)%[2]s ORDER BY a.%[1]s%[3]s, a.idx%[3]s", column, and, order)
}

func (*postgres) also(column string, n int) string {
	return fmt.Sprintf(" AND a.%s = $%d", column, n)
}

func (*postgres) sealedFields(body string) string {
	return "(SELECT count(*) FROM json_object_keys(" + body + "::json -> 'sealed'))"
}

func (*postgres) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, writeWithin)
}

func (*postgres) heartbeat() time.Duration { return beatEvery }

// class goes by SQLSTATE (PostgreSQL, appendix A).
func (*postgres) class(err error) error {
	if err == nil || errors.Is(err, ErrMismatch) || errors.Is(err, ErrLost) {
		return err
	}
	var pe *pgconn.PgError
	var ce *pgconn.ConnectError
	var ne *net.OpError
	switch {
	case errors.As(err, &pe):
		switch class := pe.Code[:2]; {
		case class == "08" || class == "57" && pe.Code != "57014" || pe.Code == "25P03" || pe.Code == "53300": // connection, shutdown, too many
			return fmt.Errorf("%w: %w", ErrLost, err)
		case class == "XX" && pe.Code != "XX000": // data or index corrupted
			return fmt.Errorf("%w: the database is damaged: %w", ErrMismatch, err)
		case pe.Code == "42P01" || pe.Code == "42703" || pe.Code == "3F000": // no such table, column or schema
			return fmt.Errorf("%w: the database's schema was altered: %w", ErrMismatch, err)
		case class == "22" || class == "54": // what json makes of a body: nested too deep, not Unicode
			return fmt.Errorf("%w: %w", errRefused, err)
		}
	case errors.As(err, &ce), errors.As(err, &ne), errors.Is(err, driver.ErrBadConn), errors.Is(err, sql.ErrConnDone),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed), pgconn.Timeout(err),
		strings.Contains(err.Error(), "conn closed"): // pgx has no name for it
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	return err
}

// statements returns what makes an empty ledger. Triggers fire for each
// statement, not each row; ALWAYS has them fire also under
// session_replication_role = replica. COLLATE "C" keeps an upgrade of the
// machine's locales from reordering an index.
func (p *postgres) statements() []string {
	s := p.schema + "."
	var table strings.Builder
	table.WriteString(`CREATE TABLE ` + s + `entries (idx bigint PRIMARY KEY, body text COLLATE "C" NOT NULL`)
	for _, c := range columns {
		fmt.Fprintf(&table, `, %s text COLLATE "C" GENERATED ALWAYS AS (%s) STORED`, c.name, c.postgres())
		if c.name == "id" {
			table.WriteString(" NOT NULL")
		}
	}
	table.WriteString(")")
	out := []string{table.String()}
	for _, c := range columns {
		if c.name == "id" {
			out = append(out, "CREATE UNIQUE INDEX entries_id ON "+s+"entries (id)")
		} else if c.indexed {
			out = append(out, fmt.Sprintf("CREATE INDEX entries_%s ON %sentries (%[1]s, idx) WHERE %[1]s IS NOT NULL", c.name, s))
		}
	}
	out = append(out,
		// As in SQLite, see sqliteSchema.
		"CREATE TABLE "+s+"hashes (idx bigint PRIMARY KEY, nodes bytea NOT NULL CHECK (octet_length(nodes) > 0 AND octet_length(nodes) % 32 = 0))",
		"CREATE TABLE "+s+"checkpoints (size bigint PRIMARY KEY, note text NOT NULL)",
		"CREATE TABLE "+s+"open_requests (request text COLLATE \"C\" PRIMARY KEY, state text NOT NULL)",
		"CREATE TABLE "+s+"sealed (idx bigint NOT NULL, field text COLLATE \"C\" NOT NULL, box bytea NOT NULL, PRIMARY KEY (idx, field))",
	)
	for _, name := range slices.Sorted(maps.Keys(p.functions())) {
		out = append(out, "CREATE FUNCTION "+s+name+"() RETURNS trigger LANGUAGE plpgsql AS $fn$"+p.functions()[name]+"$fn$")
	}
	for _, t := range appendOnly {
		out = append(out,
			fmt.Sprintf("CREATE TRIGGER %s_append AFTER INSERT ON %s%[1]s REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION %[2]s%[1]s_append()", t, s),
			fmt.Sprintf("CREATE TRIGGER %s_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON %s%[1]s FOR EACH STATEMENT EXECUTE FUNCTION %[2]skeep()", t, s),
			fmt.Sprintf("ALTER TABLE %s%s ENABLE ALWAYS TRIGGER %[2]s_append", s, t),
			fmt.Sprintf("ALTER TABLE %s%s ENABLE ALWAYS TRIGGER %[2]s_keep", s, t))
	}
	return out
}

// appendOnly are the tables that are the log.
var appendOnly = []string{"entries", "hashes", "checkpoints"}

// postgres is the expression of c. json, not jsonb: it costs less, and knows no
// number that is too large for it.
func (c column) postgres() string {
	path := "->> '" + c.path[0] + "'"
	if len(c.path) > 1 {
		path = "#>> '{" + strings.Join(c.path, ",") + "}'"
	}
	return "nullif(body::json " + path + ", '')"
}

// functions are the bodies of the trigger functions. They name the schema, so
// that no search_path leads them elsewhere.
func (p *postgres) functions() map[string]string {
	const appended = `
DECLARE lo bigint; hi bigint; n bigint;
BEGIN
  SELECT min(%[2]s), max(%[2]s), count(*) INTO lo, hi, n FROM fresh;
  IF n > 0 AND (%[3]s) THEN
    RAISE EXCEPTION '%[1]s are only appended';
  END IF;
  RETURN NULL;
END`
	const next = `lo < 0 OR hi - lo + 1 <> n OR lo <> coalesce((SELECT max(idx) + 1 FROM %[1]s WHERE idx < lo), 0) OR hi <> (SELECT max(idx) FROM %[1]s)`
	entries, hashes, checkpoints := p.schema+".entries", p.schema+".hashes", p.schema+".checkpoints"
	return map[string]string{
		// The hash row of an entry follows it: an entry which has one is not new.
		"entries_append":     fmt.Sprintf(appended, "entries", "idx", fmt.Sprintf(next, entries)+" OR EXISTS (SELECT 1 FROM "+hashes+" WHERE idx >= lo)"),
		"hashes_append":      fmt.Sprintf(appended, "hashes", "idx", fmt.Sprintf(next, hashes)),
		"checkpoints_append": fmt.Sprintf(appended, "checkpoints", "size", "lo < 0 OR (SELECT count(*) FROM "+checkpoints+" WHERE size >= lo) <> n"),
		"keep":               "\nBEGIN\n  RAISE EXCEPTION '% are only appended', TG_TABLE_NAME;\nEND",
	}
}

// ensureSchema makes the schema, or brings an older one up, in one transaction:
// a crash leaves none, or the old one whole. Both are the owner's to do.
func (p *postgres) ensureSchema(ctx context.Context, c *sql.Conn) error {
	if err := checkMigrations(p.migrations); err != nil {
		return err
	}
	last := newest(p.migrations)
	version, err := p.version(ctx, c)
	if err != nil {
		return err
	}
	if version == last {
		return p.warnOwner(ctx, c)
	}
	stmts := []string{"BEGIN"}
	if version == 0 {
		// The schema itself may be there, made by who may make one.
		var there bool
		if err := c.QueryRowContext(ctx, "SELECT to_regnamespace($1) IS NOT NULL", p.schema).Scan(&there); err != nil {
			return err
		}
		if !there {
			stmts = append(stmts, "CREATE SCHEMA "+p.schema)
		}
		stmts = append(stmts, p.statements()...)
		version = 1
	}
	for _, m := range p.migrations[version-1:] {
		for _, s := range m.postgres {
			stmts = append(stmts, p.named(s))
		}
	}
	stmts = append(stmts, fmt.Sprintf("COMMENT ON TABLE %s.entries IS '%s%d'", p.schema, schemaComment, last), "COMMIT")
	for _, s := range stmts {
		if _, err := c.ExecContext(ctx, s); err != nil {
			_, _ = c.ExecContext(context.WithoutCancel(ctx), "ROLLBACK") // fails with the connection, where that is what failed
			var pe *pgconn.PgError
			if errors.As(err, &pe) && pe.Code == "42501" {
				if version < last && len(stmts) > 0 && p.there(ctx, c) {
					return fmt.Errorf("%w: user %s may not bring its schema from %d to %d: run `countersign ledger init --postgres OWNER-DSN --role %[2]s` of this version: %[5]w", ErrOlder, p.config.User, version, last, err)
				}
				return fmt.Errorf("user %s may not make the ledger's schema %s: make it with `countersign ledger init --postgres OWNER-DSN --role %[1]s`: %[3]w", p.config.User, p.schema, err)
			}
			return fmt.Errorf("making the ledger's schema: %w", err)
		}
	}
	_, err = p.version(ctx, c)
	return err
}

// there reports whether the schema holds a ledger.
func (p *postgres) there(ctx context.Context, q querier) bool {
	var is bool
	err := q.QueryRowContext(ctx, "SELECT to_regclass($1) IS NOT NULL", p.schema+".entries").Scan(&is)
	return err == nil && is
}

// named puts the schema's name into a migration's text.
func (p *postgres) named(s string) string { return strings.ReplaceAll(s, "{schema}", p.schema) }

// version reads which version of the schema there is, 0 for none, and compares
// the schema with it.
func (p *postgres) version(ctx context.Context, q querier) (int, error) {
	found, err := p.describe(ctx, q)
	if err != nil || len(found) == 0 {
		return 0, err
	}
	var comment string
	if err := q.QueryRowContext(ctx, "SELECT coalesce(obj_description(to_regclass($1), 'pg_class'), '')", p.schema+".entries").Scan(&comment); err != nil {
		return 0, err
	}
	version, err := commentVersion(comment)
	if err != nil {
		return 0, err
	}
	if last := newest(p.migrations); version > last {
		return 0, newer(version, last)
	}
	return version, p.compare(found, version)
}

// warnOwner says in the log that a recorder runs as who could take the triggers
// away.
func (p *postgres) warnOwner(ctx context.Context, c *sql.Conn) error {
	var owns bool
	err := c.QueryRowContext(ctx, "SELECT pg_has_role(nspowner, 'USAGE') OR pg_has_role((SELECT relowner FROM pg_class WHERE oid = to_regclass('entries')), 'USAGE') FROM pg_namespace WHERE nspname = $1", p.schema).Scan(&owns)
	if err == nil && owns {
		p.log.Warn("the ledger's tables belong to the role that the recorder runs as, which could take their triggers away: have another role own them, see `countersign ledger init`", zap.String("role", p.config.User))
	}
	return err
}

// compare compares the schema as it stands with what it should be at a version.
func (p *postgres) compare(found map[string]string, version int) error {
	wanted := p.wanted()
	for _, m := range p.migrations[:version-1] {
		for name, def := range m.describes {
			wanted[p.named(name)] = p.named(def)
		}
	}
	for name, want := range wanted {
		got, ok := found[name]
		if !ok {
			return alteredSchema("missing %s", name)
		}
		if got != want {
			return alteredSchema("%s is %q, want %q", name, got, want)
		}
		delete(found, name)
	}
	for name := range found {
		return alteredSchema("%s is not part of it", name)
	}
	return nil
}

// describe reads the schema as it stands from the server's catalogues: name to
// definition.
func (p *postgres) describe(ctx context.Context, q querier) (map[string]string, error) {
	found := map[string]string{}
	err := each(ctx, q, func(rows *sql.Rows) error {
		var name, def string
		err := rows.Scan(&name, &def)
		found[name] = def
		return err
	}, `WITH s AS (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = $1),
	rel AS (SELECT c.* FROM pg_catalog.pg_class c, s WHERE c.relnamespace = s.oid AND c.relkind NOT IN ('i', 'I'))
	SELECT 'relation ' || relname, concat_ws(' ', relkind, relpersistence, relrowsecurity, relispartition, relhassubclass) FROM rel
	UNION ALL SELECT 'column ' || rel.relname || '.' || a.attname, concat_ws(' ', pg_catalog.format_type(a.atttypid, a.atttypmod), co.collname, a.attnotnull, a.attgenerated, pg_catalog.pg_get_expr(d.adbin, d.adrelid))
		FROM rel JOIN pg_catalog.pg_attribute a ON a.attrelid = rel.oid AND a.attnum > 0 AND NOT a.attisdropped
		LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
	UNION ALL SELECT 'index ' || ic.relname, concat_ws(' ', pg_catalog.pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisready)
		FROM rel JOIN pg_catalog.pg_index i ON i.indrelid = rel.oid JOIN pg_catalog.pg_class ic ON ic.oid = i.indexrelid
	UNION ALL SELECT 'constraint ' || co.conname, concat_ws(' ', pg_catalog.pg_get_constraintdef(co.oid), co.convalidated)
		FROM rel JOIN pg_catalog.pg_constraint co ON co.conrelid = rel.oid WHERE co.contype <> 'n'
	UNION ALL SELECT 'trigger ' || rel.relname || '.' || t.tgname, concat_ws(' ', t.tgtype, t.tgenabled, n.nspname || '.' || f.proname, t.tgnewtable, t.tgoldtable, t.tgqual IS NULL, t.tgnargs)
		FROM rel JOIN pg_catalog.pg_trigger t ON t.tgrelid = rel.oid AND NOT t.tgisinternal JOIN pg_catalog.pg_proc f ON f.oid = t.tgfoid JOIN pg_catalog.pg_namespace n ON n.oid = f.pronamespace
	UNION ALL SELECT 'function ' || f.proname, concat_ws(' ', l.lanname, f.prosecdef, f.proconfig, f.pronargs, f.prosrc)
		FROM pg_catalog.pg_proc f JOIN s ON f.pronamespace = s.oid JOIN pg_catalog.pg_language l ON l.oid = f.prolang
	UNION ALL SELECT 'rule ' || rel.relname || '.' || r.rulename, pg_catalog.pg_get_ruledef(r.oid) FROM rel JOIN pg_catalog.pg_rewrite r ON r.ev_class = rel.oid`, p.schema)
	return found, err
}

// The bits of pg_trigger.tgtype (PostgreSQL, include/catalog/pg_trigger.h).
const (
	triggerBefore   = 1 << 1
	triggerInsert   = 1 << 2
	triggerDelete   = 1 << 3
	triggerUpdate   = 1 << 4
	triggerTruncate = 1 << 5
)

// wanted is what describe says of a ledger that nobody altered, in PostgreSQL's
// own writing.
func (p *postgres) wanted() map[string]string {
	want := map[string]string{}
	text := func(collation string, notNull bool) string {
		return fmt.Sprintf("text %s %s ", collation, boolean(notNull))
	}
	for _, c := range []string{"entries.body", "open_requests.request", "sealed.field"} {
		want["column "+c] = text("C", true)
	}
	for _, c := range columns {
		path := "->> '" + c.path[0] + "'::text"
		if len(c.path) > 1 {
			path = "#>> '{" + strings.Join(c.path, ",") + "}'::text[]"
		}
		want["column entries."+c.name] = fmt.Sprintf("text C %s s NULLIF(((body)::json %s), ''::text)", boolean(c.name == "id"), path)
		if c.name == "id" {
			want["index entries_id"] = fmt.Sprintf("CREATE UNIQUE INDEX entries_id ON %s.entries USING btree (id) t t", p.schema)
		} else if c.indexed {
			want["index entries_"+c.name] = fmt.Sprintf("CREATE INDEX entries_%s ON %s.entries USING btree (%[1]s, idx) WHERE (%[1]s IS NOT NULL) t t", c.name, p.schema)
		}
	}
	for table, key := range map[string]string{"entries": "idx", "hashes": "idx", "checkpoints": "size", "open_requests": "request", "sealed": "idx, field"} {
		want["relation "+table] = "r p f f f"
		want["index "+table+"_pkey"] = fmt.Sprintf("CREATE UNIQUE INDEX %s_pkey ON %s.%[1]s USING btree (%[3]s) t t", table, p.schema, key)
		want["constraint "+table+"_pkey"] = "PRIMARY KEY (" + key + ") t"
	}
	for _, c := range []string{"entries.idx", "hashes.idx", "checkpoints.size", "sealed.idx"} {
		want["column "+c] = "bigint t "
	}
	for _, c := range []string{"checkpoints.note", "open_requests.state"} {
		want["column "+c] = text("default", true)
	}
	for _, c := range []string{"hashes.nodes", "sealed.box"} {
		want["column "+c] = "bytea t "
	}
	want["constraint hashes_nodes_check"] = "CHECK (((octet_length(nodes) > 0) AND ((octet_length(nodes) % 32) = 0))) t"
	for _, t := range appendOnly {
		want["trigger "+t+"."+t+"_append"] = fmt.Sprintf("%d A %s.%s_append fresh t 0", triggerInsert, p.schema, t)
		want["trigger "+t+"."+t+"_keep"] = fmt.Sprintf("%d A %s.keep t 0", triggerBefore|triggerUpdate|triggerDelete|triggerTruncate, p.schema)
	}
	for name, body := range p.functions() {
		want["function "+name] = "plpgsql f 0 " + body
	}
	return want
}

// boolean is how PostgreSQL writes a boolean.
func boolean(b bool) string {
	if b {
		return "t"
	}
	return "f"
}

func (p *postgres) checkColumns(ctx context.Context, q querier, from, to int64) error {
	var names, exprs []string
	for _, c := range columns {
		names, exprs = append(names, c.name), append(exprs, c.postgres())
	}
	var idx int64
	err := q.QueryRowContext(ctx, "SELECT idx FROM entries WHERE idx >= $1 AND idx < $2 AND ("+strings.Join(names, ", ")+") IS DISTINCT FROM ("+strings.Join(exprs, ", ")+") LIMIT 1", from, to).Scan(&idx)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("%w: the columns of entry %d are not what its body says", ErrMismatch, idx)
	}
	return err
}

// checkPages compares the schema again, and what each index holds with what the
// table does: an index-only scan reads values from the index, a sequential one
// from the table.
func (p *postgres) checkPages(ctx context.Context, c *sql.Conn) error {
	tx, err := c.BeginTx(ctx, &sql.TxOptions{ReadOnly: true, Isolation: sql.LevelRepeatableRead})
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if version, err := p.version(ctx, tx); err != nil {
		return err
	} else if version == 0 {
		return alteredSchema("it is gone")
	}
	var names, sums []string
	for _, col := range columns {
		if col.indexed {
			names, sums = append(names, col.name), append(sums, "coalesce(sum(hashtextextended("+col.name+", idx)), 0)::text")
		}
	}
	table, into := make([]string, len(sums)), make([]any, len(sums))
	for i := range table {
		into[i] = &table[i]
	}
	for _, set := range []string{"enable_seqscan = on", "enable_indexscan = off", "enable_bitmapscan = off", "max_parallel_workers_per_gather = 0"} {
		if _, err := tx.ExecContext(ctx, "SET LOCAL "+set); err != nil {
			return err
		}
	}
	if err := tx.QueryRowContext(ctx, "SELECT "+strings.Join(sums, ", ")+" FROM entries").Scan(into...); err != nil {
		return err
	}
	for _, set := range []string{"enable_seqscan = off", "enable_indexscan = on"} {
		if _, err := tx.ExecContext(ctx, "SET LOCAL "+set); err != nil {
			return err
		}
	}
	for i, sum := range sums {
		var index string
		if err := tx.QueryRowContext(ctx, "SELECT "+sum+" FROM entries WHERE "+names[i]+" IS NOT NULL").Scan(&index); err != nil {
			return err
		}
		if index != table[i] {
			return fmt.Errorf("%w: the index entries_%s does not hold what the table does", ErrMismatch, names[i])
		}
	}
	return nil
}

// InitPostgres makes the schema of a ledger in the database that dsn, the
// owner's connection string, names, and lets role do there what a recorder does
// and nothing else: read all, append to the log, and change what lies beside it.
// Made already, it compares the schema
// (ErrMismatch), brings an older one up, and grants again. The role
// must exist.
func InitPostgres(ctx context.Context, dsn, role string) error {
	p, err := newPostgres(dsn, zap.NewNop())
	if err != nil {
		return err
	}
	return p.init(ctx, role)
}

func (p *postgres) init(ctx context.Context, role string) error {
	db := p.connect(p.config)
	defer db.Close()
	c, err := db.Conn(ctx)
	if err != nil {
		return p.class(err)
	}
	defer c.Close()
	if err := p.ensureSchema(ctx, c); err != nil {
		return p.class(err)
	}
	to := " TO " + pgx.Identifier{role}.Sanitize()
	for _, grant := range []string{
		"USAGE ON SCHEMA " + p.schema,
		"SELECT, INSERT ON " + p.schema + "." + strings.Join(appendOnly, ", "+p.schema+"."),
		"SELECT, INSERT, UPDATE, DELETE ON " + p.schema + ".open_requests",
		"SELECT, INSERT, DELETE ON " + p.schema + ".sealed",
	} {
		if _, err := c.ExecContext(ctx, "GRANT "+grant+to); err != nil {
			return fmt.Errorf("letting %s use the ledger: %w", role, err)
		}
	}
	return nil
}
