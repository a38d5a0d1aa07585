package guard

import "strings"

// What PostgreSQL itself brings and a step may use. Whatever is not named here
// is refused, so that a function of a later version, or one that was overlooked,
// is refused too.

func set(words ...string) map[string]bool {
	m := map[string]bool{}
	for _, w := range strings.Fields(strings.Join(words, " ")) {
		m[w] = true
	}
	return m
}

// pureFunctions are functions of pg_catalog that change nothing, wait for
// nothing, and read neither files nor tables other than by their arguments or
// what systemRelations shows anyway (PostgreSQL 15 documentation, chapter 9).
var pureFunctions = set(
	// aggregates and windows (9.21, 9.22)
	`array_agg avg bit_and bit_or bit_xor bool_and bool_or count every json_agg jsonb_agg json_object_agg jsonb_object_agg max min
	range_agg range_intersect_agg string_agg sum any_value corr covar_pop covar_samp regr_avgx regr_avgy regr_count regr_intercept
	regr_r2 regr_slope regr_sxx regr_sxy regr_syy stddev stddev_pop stddev_samp variance var_pop var_samp mode percentile_cont
	percentile_disc rank dense_rank percent_rank cume_dist row_number ntile lag lead first_value last_value nth_value`,
	// numbers (9.3)
	`abs cbrt ceil ceiling degrees div exp factorial floor gcd lcm ln log log10 min_scale mod pi power pow radians round scale sign sqrt
	trim_scale trunc width_bucket random acos acosd asin asind atan atand atan2 atan2d cos cosd cot cotd sin sind tan tand sinh cosh
	tanh asinh acosh atanh erf erfc`,
	// text and bytes (9.4 to 9.7)
	`ascii bit_length btrim char_length character_length chr concat concat_ws convert_from convert_to decode encode format get_bit
	get_byte initcap is_normalized left length like_escape lower lpad ltrim md5 normalize octet_length overlay parse_ident position
	quote_ident quote_literal quote_nullable regexp_count regexp_instr regexp_like regexp_match regexp_matches regexp_replace
	regexp_split_to_array regexp_split_to_table regexp_substr repeat replace reverse right rpad rtrim set_bit set_byte sha224
	sha256 sha384 sha512 similar_escape similar_to_escape split_part starts_with string_to_array string_to_table strpos substr
	substring to_ascii to_hex translate unistr upper bit_count`,
	// formats, dates and times (9.8, 9.9)
	`to_char to_date to_number to_timestamp age clock_timestamp date_bin date_part date_trunc extract isfinite justify_days
	justify_hours justify_interval make_date make_interval make_time make_timestamp make_timestamptz now statement_timestamp
	timeofday timezone transaction_timestamp overlaps date_add date_subtract`,
	// enums, geometry, networks (9.10 to 9.12)
	`enum_first enum_last enum_range area center diagonal diameter height isclosed isopen npoints pclose popen radius slope
	width box circle line lseg path point polygon bound_box abbrev broadcast family host hostmask inet_merge inet_same_family
	masklen netmask network set_masklen macaddr8_set7bit`,
	// text search (9.13); ts_stat and ts_rewrite with text run SQL and are not here
	`array_to_tsvector get_current_ts_config numnode phraseto_tsquery plainto_tsquery querytree setweight strip to_tsquery to_tsvector
	json_to_tsvector jsonb_to_tsvector ts_delete ts_filter ts_headline ts_rank ts_rank_cd tsquery_phrase tsvector_to_array
	websearch_to_tsquery`,
	// UUIDs and JSON (9.14, 9.16)
	`gen_random_uuid to_json to_jsonb array_to_json row_to_json json_build_array jsonb_build_array json_build_object
	jsonb_build_object json_object jsonb_object json_array_elements jsonb_array_elements json_array_elements_text
	jsonb_array_elements_text json_array_length jsonb_array_length json_each jsonb_each json_each_text jsonb_each_text
	json_extract_path jsonb_extract_path json_extract_path_text jsonb_extract_path_text json_object_keys jsonb_object_keys
	json_populate_record jsonb_populate_record json_populate_recordset jsonb_populate_recordset json_to_record jsonb_to_record
	json_to_recordset jsonb_to_recordset json_strip_nulls jsonb_strip_nulls jsonb_set jsonb_set_lax jsonb_insert jsonb_path_exists
	jsonb_path_match jsonb_path_query jsonb_path_query_array jsonb_path_query_first jsonb_path_exists_tz jsonb_path_match_tz
	jsonb_path_query_tz jsonb_path_query_array_tz jsonb_path_query_first_tz jsonb_pretty json_typeof jsonb_typeof`,
	// arrays, ranges, sets (9.19, 9.20, 9.25, 9.2)
	`array_append array_cat array_dims array_fill array_length array_lower array_ndims array_position array_positions array_prepend
	array_remove array_replace array_to_string array_upper cardinality trim_array unnest array_shuffle array_sample isempty lower_inc
	upper_inc lower_inf upper_inf range_merge multirange int4range int8range numrange tsrange tstzrange daterange int4multirange
	int8multirange nummultirange tsmultirange tstzmultirange datemultirange generate_series generate_subscripts num_nonnulls num_nulls`,
	// casts written as calls
	`bool bpchar char cidr date float4 float8 int2 int4 int8 interval macaddr macaddr8 name numeric oid text time
	timestamp timestamptz timetz varchar money`,
	// the session and the catalogue, as clients ask on connecting and psql for \d (9.26)
	`current_database current_catalog current_query current_schema current_schemas current_user session_user user version
	pg_backend_pid pg_is_in_recovery pg_postmaster_start_time pg_conf_load_time pg_my_temp_schema pg_is_other_temp_schema
	inet_server_port pg_client_encoding pg_char_to_encoding pg_encoding_to_char getdatabaseencoding
	has_any_column_privilege has_column_privilege has_database_privilege has_function_privilege has_schema_privilege
	has_sequence_privilege has_table_privilege has_type_privilege pg_has_role row_security_active
	pg_collation_is_visible pg_function_is_visible pg_operator_is_visible pg_table_is_visible pg_type_is_visible
	pg_ts_config_is_visible pg_opclass_is_visible pg_opfamily_is_visible pg_statistics_obj_is_visible pg_conversion_is_visible
	format_type pg_get_constraintdef pg_get_expr pg_get_function_arguments pg_get_function_identity_arguments
	pg_get_function_result pg_get_indexdef pg_get_keywords pg_get_partkeydef pg_get_partition_constraintdef pg_get_ruledef
	pg_get_serial_sequence pg_get_statisticsobjdef pg_get_statisticsobjdef_columns pg_get_triggerdef pg_get_userbyid pg_get_viewdef
	pg_index_column_has_property pg_index_has_property pg_indexam_has_property pg_typeof pg_collation_for pg_basetype
	pg_relation_is_publishable pg_relation_is_updatable pg_column_is_updatable to_regclass to_regcollation to_regnamespace
	to_regoper to_regoperator to_regproc to_regprocedure to_regrole to_regtype obj_description col_description
	shobj_description pg_describe_object pg_partition_ancestors pg_partition_root pg_partition_tree pg_table_size
	pg_total_relation_size pg_relation_size pg_indexes_size pg_size_pretty pg_size_bytes pg_column_size pg_database_size
	pg_tablespace_size pg_relation_filenode aclexplode acldefault makeaclitem pg_options_to_table txid_current_if_assigned
	pg_current_xact_id_if_assigned pg_input_is_valid`,
)

// Functions that JDBC's catalogue queries need beside pg_catalog's.
var schemaFunctions = set(`information_schema._pg_expandarray information_schema._pg_truetypid information_schema._pg_truetypmod
	information_schema._pg_char_max_length information_schema._pg_numeric_precision information_schema._pg_numeric_scale
	information_schema._pg_datetime_precision`)

// effectOnly are functions of pg_catalog that return no stored value, though
// they are refused unless a grant names them.
var effectOnly = set(`nextval currval lastval setval pg_sleep pg_sleep_for pg_sleep_until pg_notify pg_advisory_lock pg_advisory_unlock
	pg_advisory_xact_lock pg_try_advisory_lock pg_try_advisory_xact_lock txid_current pg_current_xact_id setseed`)

// rowFunctions are functions of several columns in FROM; of the others, those
// in openFunctions may have columns that are not known.
var rowFunctions = map[string][]string{
	"json_each": {"key", "value"}, "jsonb_each": {"key", "value"}, "json_each_text": {"key", "value"}, "jsonb_each_text": {"key", "value"},
	"json_array_elements": {"value"}, "jsonb_array_elements": {"value"}, "json_array_elements_text": {"value"}, "jsonb_array_elements_text": {"value"},
	"pg_options_to_table": {"option_name", "option_value"}, "aclexplode": {"grantor", "grantee", "privilege_type", "is_grantable"},
	"pg_partition_tree": {"relid", "parentrelid", "isleaf", "level"}, "pg_partition_ancestors": {"relid"},
	"pg_get_keywords": {"word", "catcode", "barelabel", "catdesc", "baredesc"},
	"_pg_expandarray": {"x", "n"},
}

var openFunctions = set("unnest json_populate_record jsonb_populate_record json_populate_recordset jsonb_populate_recordset")

// plainTypes are types of pg_catalog that a value may be cast to. Not among
// them: xml, whose input reads what a document refers to.
var plainTypes = set(`bit bool box bpchar bytea char cidr circle date daterange datemultirange float4 float8 inet int2 int2vector int4
	int4range int4multirange int8 int8range int8multirange interval json jsonb jsonpath line lseg macaddr macaddr8 money name
	numeric numrange nummultirange oid oidvector path pg_lsn pg_node_tree point polygon regclass regcollation regconfig regdictionary
	regnamespace regoper regoperator regproc regprocedure regrole regtype text tid time timestamp timestamptz timetz tsmultirange
	tsquery tsrange tstzmultirange tstzrange tsvector txid_snapshot pg_snapshot uuid varbit varchar xid xid8 aclitem`)

// systemRelations are what may be read of the catalogue: what describes the
// tables, never what holds data, statistics, sessions, files or secrets.
var systemRelations = func() map[string]bool {
	m := map[string]bool{}
	for name := range set(`pg_aggregate pg_am pg_amop pg_amproc pg_attrdef pg_attribute pg_auth_members pg_cast pg_class pg_collation pg_constraint pg_conversion
		pg_database pg_default_acl pg_depend pg_description pg_enum pg_event_trigger pg_extension pg_index pg_indexes pg_inherits pg_language
		pg_matviews pg_namespace pg_opclass pg_operator pg_opfamily pg_partitioned_table pg_policies pg_policy pg_proc pg_publication
		pg_publication_namespace pg_publication_rel pg_publication_tables pg_range pg_rewrite pg_roles pg_rules pg_sequence pg_shdescription
		pg_statistic_ext pg_tables pg_tablespace pg_timezone_abbrevs pg_timezone_names pg_trigger pg_ts_config pg_ts_dict pg_ts_parser
		pg_ts_template pg_type pg_views`) {
		m["pg_catalog."+name] = true
	}
	for name := range set(`applicable_roles character_sets check_constraints collations column_privileges columns constraint_column_usage
		constraint_table_usage domain_constraints domains element_types enabled_roles information_schema_catalog_name key_column_usage parameters
		referential_constraints role_column_grants role_table_grants schemata sequences table_constraints table_privileges tables triggers
		views view_column_usage view_table_usage`) {
		m["information_schema."+name] = true
	}
	return m
}()

// secretColumns are columns of systemRelations that are always hidden: they
// hold stored values, or code in which people keep secrets.
var secretColumns = set(`pg_attribute.attmissingval pg_proc.prosrc pg_proc.prosqlbody pg_proc.proconfig pg_proc.probin pg_roles.rolconfig
	pg_event_trigger.evttags`)

// settings may be SET and RESET, each to one of its values where it has any.
// What moves the meaning of a statement (search_path, role, row_security,
// standard_conforming_strings off, another encoding) is not among them.
var settings = map[string]map[string]bool{
	"application_name": nil, "bytea_output": nil, "client_encoding": set("utf8 utf-8 unicode"), "client_min_messages": set("log notice warning error"),
	"datestyle": nil, "default_transaction_deferrable": nil, "default_transaction_isolation": nil, "default_transaction_read_only": nil,
	"extra_float_digits": nil, "geqo": nil, "idle_in_transaction_session_timeout": nil, "intervalstyle": nil, "jit": nil,
	"lock_timeout": nil, "plan_cache_mode": nil, "standard_conforming_strings": set("on"), "statement_timeout": nil, "timezone": nil,
	"transaction_deferrable": nil, "transaction_isolation": nil, "transaction_read_only": nil,
}

// shown may be SHOWn beside them.
var shown = set(`server_version server_version_num server_encoding search_path is_superuser session_authorization integer_datetimes
	max_identifier_length max_index_keys lc_collate lc_ctype lc_messages lc_monetary lc_numeric lc_time in_hot_standby block_size
	max_connections`)
