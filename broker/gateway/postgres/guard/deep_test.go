package guard

import (
	"strings"
	"testing"
)

// nestings are ways to make a tree deep.
var nestings = map[string]func(n int) string{
	"parentheses": func(n int) string { return "SELECT " + strings.Repeat("(", n) + "1" + strings.Repeat(")", n) },
	"open":        func(n int) string { return "SELECT " + strings.Repeat("(", n) },
	"sums":        func(n int) string { return "SELECT 1" + strings.Repeat("+1", n) },
	"not":         func(n int) string { return "SELECT " + strings.Repeat("not ", n) + "true" },
	"minus":       func(n int) string { return "SELECT " + strings.Repeat("- ", n) + "a" },
	"brackets":    func(n int) string { return "SELECT ARRAY" + strings.Repeat("[", n) + strings.Repeat("]", n) },
	"rows":        func(n int) string { return "SELECT " + strings.Repeat("(1,", n) + "1" + strings.Repeat(")", n) },
	"lists":       func(n int) string { return "SELECT " + strings.Repeat("(1,2,", n) + "1" + strings.Repeat(")", n) },
	"calls":       func(n int) string { return "SELECT " + strings.Repeat("f(", n) + "1" + strings.Repeat(")", n) },
	"selects":     func(n int) string { return strings.Repeat("SELECT (", n) + "1" + strings.Repeat(")", n) },
	"unions":      func(n int) string { return "SELECT 1" + strings.Repeat(" UNION SELECT 1", n) },
	"casts":       func(n int) string { return "SELECT 1" + strings.Repeat("::int", n) },
	"joins":       func(n int) string { return "SELECT 1 FROM a" + strings.Repeat(" CROSS JOIN a", n) },
	"cases": func(n int) string {
		return "SELECT " + strings.Repeat("CASE WHEN ", n) + "1" + strings.Repeat(" THEN 1 END", n)
	},
	"is null": func(n int) string { return "SELECT 1" + strings.Repeat(" IS NULL", n) },
	"from": func(n int) string {
		return strings.Repeat("SELECT * FROM (", n) + "SELECT 1" + strings.Repeat(") x", n)
	},
	"with": func(n int) string {
		return strings.Repeat("WITH x AS (", n) + "SELECT 1" + strings.Repeat(") SELECT 1", n)
	},
	"explain":    func(n int) string { return strings.Repeat("EXPLAIN ", n) + "SELECT 1" },
	"commas":     func(n int) string { return "SELECT 1" + strings.Repeat(",1", n) },
	"and":        func(n int) string { return "SELECT 1 WHERE true" + strings.Repeat(" AND true", n) },
	"strings":    func(n int) string { return "SELECT '" + strings.Repeat("(", n) + "'" },
	"subscripts": func(n int) string { return "SELECT a" + strings.Repeat("[1]", n) },
	"in":         func(n int) string { return "SELECT " + strings.Repeat("1 IN (", n) + "1" + strings.Repeat(")", n) },
}

func TestNoDepthOfNestingEndsTheProcess(t *testing.T) {
	for name, make := range nestings {
		for _, n := range []int{100, 600, 740, 1400, 2900, 10_000, 100_000} {
			sql := make(n)
			if _, why := parse(sql); why != nil && n == 100 && name != "open" && name != "explain" {
				t.Errorf("%s, %d deep: %s", name, n, why.reason)
			}
		}
	}
}
