package servicetest

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// Configured runs a server by the text of a configuration file, as an operator
// would, and returns its URL.
func Configured(t testing.TB, config []byte) string {
	t.Helper()
	url, _ := start(t, config)
	return url
}

// ConfiguredCluster runs three servers by one configuration, which belong
// together; each keeps its files in a folder of its own. stop ends one for good.
func ConfiguredCluster(t testing.TB, config []byte) (urls string, stop func(i int)) {
	t.Helper()
	const n = 3
	var ports [n]int
	var routes []string
	for i := range ports {
		// As in Cluster: peers' ports must be known before they run.
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ports[i] = l.Addr().(*net.TCPAddr).Port
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", ports[i]))
	}
	var all []string
	var stops []func()
	for i := range n {
		var o server.Options
		if err := o.ProcessConfigString(string(config)); err != nil {
			t.Fatalf("configuration: %v\n%s", err, config)
		}
		own := fmt.Appendf(bytes.ReplaceAll(config, []byte(strconv.Quote(o.StoreDir)), []byte(strconv.Quote(t.TempDir()))),
			"\nserver_name: n%d\ncluster { name: test, listen: \"127.0.0.1:%d\", routes: [%s] }\n", i, ports[i], strings.Join(routes, ", "))
		url, stop := start(t, own)
		all, stops = append(all, url), append(stops, stop)
	}
	return strings.Join(all, ","), func(i int) { stops[i]() }
}

// start runs one server until the test ends or stop is called.
func start(t testing.TB, config []byte) (url string, stop func()) {
	t.Helper()
	var o server.Options
	if err := o.ProcessConfigString(string(config)); err != nil {
		t.Fatalf("configuration: %v\n%s", err, config)
	}
	o.NoSigs, o.NoLog = true, true
	s, err := server.NewServer(&o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	stop = func() {
		s.Shutdown()
		s.WaitForShutdown()
	}
	t.Cleanup(stop)
	if !s.ReadyForConnections(30 * time.Second) {
		t.Fatal("the server does not start")
	}
	return s.ClientURL(), stop
}

// Users are the NATS users of a district on one server.
type Users struct {
	URL string
	t   testing.TB
	dir string
}

// All is the name of a user with every right, for a test's own eyes and hands.
const All = "all"

// NewUsers runs a server that lets in the district's services, so many
// validators, and [All].
func NewUsers(t testing.TB, d traffic.DistrictID, validators uint64) *Users {
	t.Helper()
	u := &Users{t: t, dir: t.TempDir()}
	var users []bus.User
	add := func(name string, p topic.Permissions) {
		public, seed, err := bus.NewNKey()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(u.Seed(name), seed, 0o600); err != nil {
			t.Fatal(err)
		}
		users = append(users, bus.User{Name: name, NKey: public, Permissions: p})
	}
	for n := uint64(1); n <= validators; n++ {
		add(topic.ValidatorUser(n), topic.ValidatorPermissions(d, n))
	}
	for _, name := range topic.ServiceUsers() {
		p, err := topic.ServicePermissions(d, name)
		if err != nil {
			t.Fatal(err)
		}
		add(name, p)
	}
	add(All, topic.Permissions{Publish: []string{">"}, Subscribe: []string{">"}})
	config, err := bus.ServerConfig("127.0.0.1:-1", t.TempDir(), users)
	if err != nil {
		t.Fatal(err)
	}
	u.URL = Configured(t, config)
	return u
}

// Seed is the file with a user's seed.
func (u *Users) Seed(name string) string { return filepath.Join(u.dir, name+".nk") }

// Connect returns a connection as a user.
func (u *Users) Connect(name string) *bus.Bus {
	u.t.Helper()
	b, err := bus.Connect(bus.ConnectOptions{URL: u.URL, Name: name, NKeyFile: u.Seed(name), User: name, Logger: Logger(u.t)})
	if err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(b.Close)
	return b
}
