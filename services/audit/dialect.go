package audit

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path"
	"strconv"
	"strings"

	"modernc.org/sqlite"
)

//go:embed migrations
var migrationFiles embed.FS

// dialect is everything in which databases differ. All other SQL here is what
// SQLite and PostgreSQL both take.
type dialect struct {
	driver string
	types  *strings.Replacer // of the migrations
	// numbered is set where parameters are $1, $2, … instead of ?.
	numbered bool
	// emptyLog moves the write-ahead log into the database; "" where files are not
	// ours to care for.
	emptyLog string
}

var sqliteDialect = dialect{
	driver:   "sqlite",
	types:    strings.NewReplacer("{key}", "INTEGER PRIMARY KEY", "{int}", "INTEGER", "{bytes}", "BLOB"),
	emptyLog: "PRAGMA wal_checkpoint(TRUNCATE)",
}

// postgresDialect is here so that a test can hold the SQL to what both take;
// nothing opens it yet.
var postgresDialect = dialect{
	driver:   "pgx",
	types:    strings.NewReplacer("{key}", "BIGINT PRIMARY KEY", "{int}", "BIGINT", "{bytes}", "BYTEA"),
	numbered: true,
}

// sql returns a statement, written with ? for parameters, as the database wants
// it. No statement here holds a question mark otherwise.
func (d dialect) sql(s string) string {
	if !d.numbered {
		return s
	}
	var b strings.Builder
	for n := 0; ; {
		before, after, found := strings.Cut(s, "?")
		b.WriteString(before)
		if !found {
			return b.String()
		}
		n++
		b.WriteString("$" + strconv.Itoa(n))
		s = after
	}
}

// migrations returns the scripts in their order; the version of a schema is how
// many of them it has.
func (d dialect) migrations() ([]string, error) {
	files, err := fs.Glob(migrationFiles, "migrations/*.sql") // sorted
	if err != nil {
		return nil, err
	}
	var out []string
	for i, f := range files {
		if want := fmt.Sprintf("%04d_", i+1); !strings.HasPrefix(path.Base(f), want) {
			return nil, fmt.Errorf("audit: %s: its name must begin with %s", f, want)
		}
		b, err := migrationFiles.ReadFile(f)
		if err != nil {
			return nil, err
		}
		out = append(out, d.types.Replace(string(b)))
	}
	return out, nil
}

// sqliteSource names a database file with the settings that we rely on. The
// write-ahead log lets others read while one writes; what a power cut takes from
// it is indexed again. What is deleted is overwritten, because it may have been
// redacted.
func sqliteSource(file string, readOnly bool) string {
	q := url.Values{"_pragma": {"busy_timeout(20000)", "cache_size(-32768)"}}
	if readOnly {
		q.Add("_pragma", "query_only(1)")
	} else {
		q["_pragma"] = append(q["_pragma"], "journal_mode(WAL)", "synchronous(NORMAL)", "secure_delete(1)")
		q.Set("_txlock", "immediate")
	}
	return "file:" + (&url.URL{Path: file}).EscapedPath() + "?" + q.Encode()
}

// Result codes of SQLite, https://sqlite.org/rescode.html.
const (
	sqliteCorrupt = 11
	sqliteNotADB  = 26
)

// ruined reports whether an error says that the database file is not one any more.
func ruined(err error) bool {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return false
	}
	code := e.Code() & 0xff
	return code == sqliteCorrupt || code == sqliteNotADB
}
